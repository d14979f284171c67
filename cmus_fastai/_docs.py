"""How the documentation shows a NamedTuple: by its fields instead of `*args, **kwargs`; only nbdev uses it"""
import inspect
import re
from nbdev.showdoc import BasicMarkdownRenderer

FIELD = re.compile(r'    \w+\s*:')


def field_lines(kind):
    "The lines of a class that name its fields, with their comments."
    body = inspect.getsource(kind).split('\n    def ')[0]
    return [line for line in body.splitlines() if FIELD.match(line)]


class FieldRenderer(BasicMarkdownRenderer):
    "nbdev's renderer, with the fields of a NamedTuple."

    def _repr_markdown_(self):
        text = super()._repr_markdown_()
        if not (inspect.isclass(self.sym) and issubclass(self.sym, tuple) and hasattr(self.sym, '_fields')):
            return text
        return text.replace('    *args, **kwargs', '\n'.join(field_lines(self.sym)), 1)
