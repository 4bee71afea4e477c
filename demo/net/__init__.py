"""DeepSeek-V4 as a training network: whole sequences, every part of the architecture, no cache.

Written for autograd and `torch.compile`; it shares no arithmetic with the engine that serves what
is trained here. Parameters carry the names of the released checkpoint, but for the routed experts:
`{layer}.ffn.experts.w13` `[E, 2I, D]` and `.w2` `[E, D, I]` hold a layer's experts in one tensor.

Legend: B sequences, T tokens, C streams, D width, H heads, X compressed entries, E experts,
I expert width. Streams, gates and softmaxes are fp32; products are in the type of `Kind.dtype`.
"""
