"""V4's conversation format as text; the tokenizer knows the markers.

Source: DeepSeek-V4 `encoding/encoding_dsv4.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from whalepod.model.chat import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

__all__ = ["ASSISTANT", "BOS", "END_THINK", "EOS", "THINK", "USER", "Dialogue", "Turn", "calls"]

_TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass
class Turn:
    """One exchange. `thought` None: the model answers at once."""

    asked: str
    answer: str
    thought: str | None = None


def tool_block(schemas: list[dict[str, object]]) -> str:
    """What a system message carries when tools are offered."""
    lines = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return "\n\n" + _TOOLS.replace("{schemas}", lines)


def calls(wanted: list[tuple[str, dict[str, object]]]) -> str:
    """A block of tool calls as the model writes it."""
    blocks = []
    for name, arguments in wanted:
        lines = [f'<｜DSML｜invoke name="{name}">']
        for key, value in arguments.items():
            text = isinstance(value, str)
            shown = value if text else json.dumps(value, ensure_ascii=False)
            flag = "true" if text else "false"
            lines.append(
                f'<｜DSML｜parameter name="{key}" string="{flag}">{shown}</｜DSML｜parameter>'
            )
        blocks.append("\n".join([*lines, "</｜DSML｜invoke>"]))
    inner = "\n".join(blocks)
    return f"\n\n<｜DSML｜tool_calls>\n{inner}\n</｜DSML｜tool_calls>"


@dataclass
class Dialogue:
    """A conversation. `keep_thoughts`: tools are on, so earlier turns keep their reasoning."""

    turns: list[Turn]
    system: str = ""
    keep_thoughts: bool = False

    def text(self) -> str:
        """The whole document, answers included."""
        return BOS + self.system + "".join(self._turn(i) for i in range(len(self.turns)))

    def prompt(self) -> str:
        """The same up to where the last answer begins."""
        last = self.turns[-1]
        whole = self.text()
        thought = "" if last.thought is None else f"{last.thought}{END_THINK}"
        return whole.removesuffix(f"{thought}{last.answer}{EOS}")

    def _turn(self, i: int) -> str:
        turn = self.turns[i]
        thinks = turn.thought is not None and (self.keep_thoughts or i == len(self.turns) - 1)
        mark = f"{THINK}{turn.thought}{END_THINK}" if thinks else END_THINK
        return f"{USER}{turn.asked}{ASSISTANT}{mark}{turn.answer}{EOS}"
