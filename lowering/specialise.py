"""From a general kernel in `kernels/` to the source for one shape.

A general kernel is real source with marks in its comments (``//`` in C++, ``#`` in Python; here ``//``)::

    constexpr int D = 128;   //= head_size         the value of a fact replaces the one that stands there
    //: begin score                                a section that a fact replaces as a whole
    //: end score
    //: if window                                  lines that stay or go, as Jinja's line statements
    //: endif
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2


def specialise(source: str, facts: Mapping[str, Any], comment: str) -> str:
    """The source with the facts folded in.

    Args:
        comment: how a comment begins in the language of the source.

    Raises:
        ValueError: the source asks for a fact that is not there.
    """
    mark = re.escape(comment)
    template = re.sub(
        rf"^(\s*){mark}: begin (\w+)\n.*?^\s*{mark}: end \2\n",
        lambda m: f"{m[1]}@@{m[2]}@@\n",
        source,
        flags=re.DOTALL | re.MULTILINE,
    )
    template = re.sub(rf"^(.*?=\s*)\S+?(;?)\s*{mark}= *(.+)$", r"\1@@\3@@\2", template, flags=re.MULTILINE)
    environment = jinja2.Environment(
        line_statement_prefix=f"{comment}:",
        variable_start_string="@@",
        variable_end_string="@@",
        comment_start_string="@#",
        comment_end_string="#@",
        block_start_string="@%",
        block_end_string="%@",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    try:
        text = environment.from_string(template).render(facts)
    except jinja2.UndefinedError as error:
        raise ValueError(f"the kernel asks for a fact that is not there: {error}") from error
    return re.sub(r"\n{3,}", "\n\n", text)
