"""Shows the doctests of an `Example:` section as code."""

import griffe


class Examples(griffe.Extension):
    """Gives the section the name under which griffe looks for doctests."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
