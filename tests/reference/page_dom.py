"""A page as a tree of what a browser would build of it, for tests of its structure."""

from html.parser import HTMLParser

VOID = {"meta", "img", "link", "br", "input"}  # SVG's elements end with a slash.


class Page(HTMLParser):
    """Elements, texts and attributes of an HTML text.

    Attributes:
        elements: tag and attributes, in order.
        text: all text that is shown.
        cells: the rows of all tables.
        unclosed: tags that were opened and not closed.
    """

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.rows, self.texts, self.unclosed = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"{tag} has an attribute twice: {attrs}"
        if tag not in VOID:
            self.unclosed.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.unclosed, f"</{tag}> closes nothing"
        assert self.unclosed.pop() == tag

    def handle_data(self, data):
        if "style" in self.unclosed:
            return
        self.texts.append(data)
        if self.unclosed and self.unclosed[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return "".join(self.texts)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def shape(self):
        """What no text from data may change: tags, and the names of their attributes."""
        return [(tag, sorted(attrs)) for tag, attrs in self.elements]

    def assert_inert(self):
        """Nothing runs, loads or leads away."""
        tags = {tag for tag, _ in self.elements}
        assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "use"}
        for tag, attrs in self.elements:
            for name, value in attrs.items():
                assert not name.startswith("on"), (tag, name)
                if name in ("href", "src", "action", "xlink:href", "srcset", "data"):
                    own = value.startswith("#") and tag == "a"
                    picture = value.startswith("data:image/webp;base64,") and tag == "img"
                    assert own or picture, (tag, name, value)
                if name == "style":
                    assert value.startswith("--share: ")
                    float(value.removeprefix("--share: "))
        (policy,) = (
            a["content"]
            for a in self.all("meta")
            if a.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
        assert self.unclosed == []
