"""How the documentation shows classes that have no signature of their own; only nbdev uses it

A NamedTuple and a dataclass are shown by their fields with the comments beside them; a class that inherits
`*args, **kwargs` (an exception, a tensor) by its base.
"""
import dataclasses
import inspect
import re
from nbdev.showdoc import BasicMarkdownRenderer

FIELD = re.compile(r'    \w+\s*:')
SIGNATURE = re.compile(r'```python\ndef \w+\(\n.*?\n\).*?\n```', re.S)


def field_lines(kind):
    "The lines of a class that name its fields, with their comments."
    body = inspect.getsource(kind).split('\n    def ')[0]
    return [line for line in body.splitlines() if FIELD.match(line)]


def class_signature(kind, text):
    "What stands in the place of the signature in `text`, or None if that is good as it is."
    if dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, '_fields')):
        return '\n'.join([f'class {kind.__name__}:', *field_lines(kind)])
    if '(\n    *args, **kwargs\n)' in text:
        return f'class {kind.__name__}({", ".join(base.__name__ for base in kind.__bases__)})'
    return None


class ClassRenderer(BasicMarkdownRenderer):
    "nbdev's renderer, with a readable head for classes without a signature of their own."

    def _repr_markdown_(self):
        text = super()._repr_markdown_()
        signature = class_signature(self.sym, text) if inspect.isclass(self.sym) else None
        if signature is None:
            return text
        return SIGNATURE.sub(lambda _: f'```python\n{signature}\n```', text, count=1)
