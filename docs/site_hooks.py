"""What the site needs besides pages: files outside of this folder that pages link to, and docstrings as Markdown."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
STUDIES = "benchmarks/results/README.md"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", STUDIES)
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def on_files(files, config):
    """Make them part of the site, at the place that they have in the repository."""
    linked = {target for page in DOCS.glob("*.md") for target in LINK.findall(page.read_text(encoding="utf-8"))}
    beside = {path.relative_to(ROOT).as_posix() for path in (ROOT / STUDIES).parent.glob("*.csv")}
    for uri in sorted({*linked, *beside, *PAGES}):
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that hold in the repository hold in the site, where this folder is the root."""
    if page.file.src_uri in PAGES:
        return re.sub(r"(?<=\]\()((?:\.\./)*)docs/", r"\1", markdown)
    return markdown if "/" in page.file.src_uri else LINK.sub(r"\1", markdown)


class Docstrings(griffe.Extension):
    """The project's docstrings are Google's, with roles and literal blocks of Sphinx; here they become Markdown."""

    def on_instance(self, *, obj, **kwargs):
        """Roles, literal blocks and examples of everything that has a docstring."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example::$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        text = text.replace("/*", "/\\*")
        text = re.sub(r"(?<!`)(\[\w+\]\[\w+\]\w*)", r"`\1`", text)  # a form such as [Kk][Ss], not a reference
        text = re.sub(r"^(    )(\w+(?:, \w+)+): ", self._split, text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", lambda role: self._link(obj, role[1]), text)

    def on_class_members(self, *, cls, **kwargs):
        """Fields of a named tuple are described by the comments beside them; options have defaults."""
        if cls.docstring is None:
            return
        text, described = cls.docstring.value, "Attributes:" in cls.docstring.value
        if not described and any(str(base) == "NamedTuple" for base in cls.bases):
            fields = [(each.name, each.source.partition("  # ")[2]) for each in cls.attributes.values()]
            text += "\n\nAttributes:\n" + "\n".join(f"    {name}: ``{of}``" for name, of in fields)
        for each in cls.attributes.values():
            made_by_a_call = isinstance(each.value, griffe.ExprCall) and each.value.arguments
            default = str(each.value.arguments[0]) if made_by_a_call else ""
            if described and default and not default.isupper() and "=" not in default:
                text = re.sub(rf"^(    {each.name}: )", rf"\1``{default}``. ", text, flags=re.MULTILINE)
        cls.docstring.value = text

    @staticmethod
    def _split(entry):
        """``a, b: text`` as two entries, which is how sections are read."""
        *others, last = entry[2].split(", ")
        return "".join(f"{entry[1]}{name}: as ``{last}``\n" for name in others) + f"{entry[1]}{last}: "

    @staticmethod
    def _link(obj, target):
        """A link where the target has a place in the reference, and its name alone where it has none."""
        try:
            path = target if target.startswith("cem") else obj.resolve(target)
        except griffe.NameResolutionError:
            path = target
        name = target.rpartition(".")[2] if target.startswith("cem") else target
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
