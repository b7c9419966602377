"""Pages load nothing, say what pictures show, and keep what is wide from widening them."""

from html.parser import HTMLParser

from rrhf_fast.stages import page

VOID = {"meta", "img"}


class Read(HTMLParser):
    """The tags of a page with their attributes, and the tags around each."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), [*self.open]))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name):
        return [(attributes, around) for tag, attributes, around in self.found if tag == name]


def test_every_part_of_a_page(tmp_path):
    (tmp_path / "plot.png").write_bytes(b"\x89PNG")
    odd = '<b>"&'
    parts = [
        page.paragraph(odd, "lead"),
        page.picture(tmp_path / "plot.png", f"Plot of {odd}"),
        page.heading(odd),
        page.figures((["", odd], [[odd, "1"]]), odd),
        page.texts(([odd, odd], [[odd, " two\n lines"]]), odd),
        page.facts({odd: odd}),
        page.code(f"a: {odd}\n"),
    ]
    page.write_page(tmp_path / "page.html", odd, parts)
    text = (tmp_path / "page.html").read_text()
    read = Read(text)
    assert read.open == [] and not read.all("b")  # tags close, texts stay texts
    assert read.words.count(odd) == 11 and " two\n lines" in read.words

    # Phones do not shrink it; both schemes have colours; only what it holds is shown.
    viewports = [at["content"] for at, _ in read.all("meta") if at.get("name") == "viewport"]
    assert viewports == ["width=device-width, initial-scale=1"]
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text
    addresses = [at[name] for _, at, _ in read.found for name in ("src", "href") if name in at]
    assert [address[:22] for address in addresses] == ["data:image/png;base64,"]
    assert "url(" not in text and "@import" not in text and "script" not in text

    # Pictures and tables scroll by themselves, by keys too, and have names.
    assert [at["alt"] for at, _ in read.all("img")] == [f"Plot of {odd}"]
    for at, around in [*read.all("img"), *read.all("table")]:
        tag, box = around[-1]
        assert (tag, box["class"], box["tabindex"]) == ("div", "scroll", "0"), at
        assert box["aria-label"]
    scopes = [at["scope"] for at, _ in read.all("th")]
    assert scopes == ["col", "col", "row", "col", "col"]
