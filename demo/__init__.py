"""How the shipped demo model is made: texts, documents, tokenizer, training, export, evaluation."""
