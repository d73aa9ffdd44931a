"""Main text of web pages: what is kept, and that no page can hang or end the job."""

import glob
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from reading import page as small_page

from data_beam.io.extract import web
from data_beam.io.extract.page import main_text
from internlm2_jax.errors import UserError

METHODS = ("trafilatura", "resiliparse")
ARTICLE = """<!DOCTYPE html><html lang="en"><head><title>The  lock &amp; the key</title>
<script>var tracking = 1;</script><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a> <a href="/shop">Shop</a> <a href="/about">About</a></nav>
<article><h1>The lock and the key</h1>
<p>A lock that opens for everybody is a door handle, said the smith, and put the key away.</p>
<p>The apprentice asked what a lock was for that opens for nobody. That, she said, is a wall.</p>
<ul><li>A handle needs no key, and keeps nobody out of the room.</li></ul>
<table><tr><td>Price of a lock</td><td>12 crowns</td></tr></table></article>
<div id="comments" class="comments"><p>First! Nice post, buy my watches.</p></div>
<footer>Copyright 2023 Example Corp. All rights reserved.</footer></body></html>"""


def reason(page, method="resiliparse", **options) -> str:
    with pytest.raises(web.ExtractionError) as raised:
        web.extract(page, "", method, **options)
    return raised.value.reason


@pytest.mark.parametrize("method", METHODS)
def test_the_main_text_and_the_title_without_what_surrounds_it(method):
    text, metadata = web.extract(ARTICLE.encode(), "http://example.com/lock", method)
    assert "put the key away." in text and "That, she said, is a wall." in text
    assert "12 crowns" in text
    if method == "trafilatura":  # the other drops short lists
        assert "keeps nobody out" in text
    for noise in ("tracking", "color", "Shop", "watches", "All rights"):
        assert noise not in text
    assert metadata == {"title": "The lock & the key"}


@pytest.mark.parametrize("method", METHODS)
def test_a_result_does_not_depend_on_earlier_pages(method):
    pages = [ARTICLE.encode(), small_page(1)]
    alone = []
    for page in pages:
        web.close()
        alone.append(web.extract(page, "", method))
    again = [web.extract(page, "", method) for page in pages * 3]
    assert again == alone * 3
    assert alone == [main_text(page, "", method) for page in pages]


PARAGRAPH = {
    "gb18030": "这是一个关于锁和钥匙的故事，师傅把钥匙收了起来，徒弟问那是为什么。" * 4,
    "shift_jis": "これは錠と鍵についての話です。親方は鍵をしまい、弟子は理由を尋ねました。" * 4,
    "koi8-r": "Это рассказ о замке и ключе: мастер убрал ключ, а ученик спросил почему. " * 4,
    "cp1252": "Schlüssel für Türen aller Größen, später auch für Fässer und Körbe. " * 4,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoding", PARAGRAPH)
@pytest.mark.parametrize("declared", ["header", "meta", "nowhere", "wrongly"])
def test_encodings(method, encoding, declared):
    meta = f'<meta charset="{encoding}">' if declared == "meta" else ""
    html = f"<html><head>{meta}</head><body><p>{PARAGRAPH[encoding]}</p></body></html>"
    charset = {"header": encoding, "wrongly": "utf-8"}.get(declared, "")
    text, metadata = main_text(html.encode(encoding), "", method, charset)
    assert PARAGRAPH[encoding].strip() in text
    assert metadata["encoding"] in (encoding, "cp932")


def test_utf8_is_believed_before_a_wrong_header():
    text, metadata = web.extract(ARTICLE.replace("smith", "Schmiedin Änne").encode(), "",
                                 "resiliparse", charset="iso-8859-1")  # fmt: skip
    assert "Schmiedin Änne" in text and "encoding" not in metadata


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tag", ["div", "b", "table><tr><td", "ul><li", "font"])
def test_a_hundred_thousand_nested_elements_take_no_time(method, tag):
    begin = time.monotonic()
    page = f"<html><body><p>{small_page(0).decode()}</p>{f'<{tag}>' * 100_000}deep</body></html>"
    assert reason(page.encode(), method, timeout=20) == "too_deep"
    assert time.monotonic() - begin < 20
    assert web.extract(small_page(1), "", method)[0]


def test_a_page_that_hangs_costs_itself():
    """A hundred thousand <div> that look closed: resiliparse needs minutes."""
    page = b"<html><body>" + b"<div></x>" * 100_000
    begin = time.monotonic()
    assert reason(page, timeout=0.5) == "extraction_timeout"
    assert time.monotonic() - begin < 30
    assert "brown fox" in web.extract(small_page(1), "", "resiliparse")[0]


def test_binary_data():
    assert reason(b"\x89PNG\r\n\0\0\0" * 100) == "binary"
    assert web.extract(b"", "", "resiliparse")[0].strip() == ""


def test_unknown_methods():
    with pytest.raises(UserError, match="newspaper"):
        web.extract("<p>x</p>", "", "newspaper")


def test_a_missing_package_is_one_line(monkeypatch):
    blocked = "import sys; sys.modules['trafilatura'] = None; sys.argv[0:1] = []; " + _CHILD
    monkeypatch.setattr(web._Child, "command", (sys.executable, "-c", blocked))
    web.close()
    with pytest.raises(UserError, match=r"trafilatura.*pip install"):
        web.extract("<p>x</p>", "", "trafilatura")


# --- the child process ------------------------------------------------------------------------

_CHILD = "from data_beam.io.extract import child; child.main(sys.argv[-2], int(sys.argv[-1]))"
# Pages that order what a broken parser does.
_ACTOR = textwrap.dedent("""
    import os, sys, time
    from data_beam.io.extract import page
    def act(data, url="", method="", charset=""):
        data = data.encode() if isinstance(data, str) else data
        if b"abort" in data: os.abort()
        if b"once" in data:
            if not os.path.exists(url):
                open(url, "w").close()
                os.abort()
        if b"sleep" in data: time.sleep(100)
        if b"memory" in data: return str(bytearray(1 << 33)), {}
        if b"raise" in data: raise KeyError("inside")
        if b"print" in data: print("noise" * 10_000, flush=True)
        return data.decode(), {}
    page.main_text = act
""")


@pytest.fixture
def actor(monkeypatch):
    monkeypatch.setattr(web._Child, "command", (sys.executable, "-c", _ACTOR + _CHILD))
    web.close()
    yield
    web.close()


def test_what_parsers_do(actor, tmp_path):
    assert reason(b"abort") == "extraction_crash"
    assert reason(b"sleep", timeout=0.1) == "extraction_timeout"
    assert reason(b"raise") == "extraction_failed"
    assert reason(b"memory", memory=1 << 30) == "extraction_memory"
    assert web.extract(b"print", "", "resiliparse")[0] == "print"
    # Ended once, from outside perhaps: the page is tried again.
    assert web.extract(b"once", str(tmp_path / "died"), "resiliparse")[0] == "once"


def test_a_child_that_was_killed_is_replaced():
    web.extract(small_page(0), "", "resiliparse")
    (child,) = web._idle["resiliparse", 2 << 30][-1:]
    child.process.kill()
    child.process.wait()
    assert "brown fox" in web.extract(small_page(0), "", "resiliparse")[0]


def test_children_are_renewed(monkeypatch):
    monkeypatch.setattr(web, "PAGES_PER_CHILD", 3)
    web.close()
    seen = set()
    for _ in range(7):
        with web._borrowed("resiliparse", 2 << 30) as child:
            seen.add(child.process.pid)
            child.extract(small_page(0), "", "", 5)
    assert len(seen) == 3


def test_threads_have_a_child_each_and_none_is_left_behind():
    web.close()
    pids, wrong = set(), []

    def work(number: int) -> None:
        for step in range(20):
            text, _ = web.extract(small_page(number * 100 + step), "", "resiliparse")
            if f"fox number {(number * 100 + step) * 31} " not in text:
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    children = [child for waiting in web._idle.values() for child in waiting]
    pids = {child.process.pid for child in children}
    assert not wrong and 1 <= len(pids) <= 4
    web.close()
    assert all(child.process.returncode is not None for child in children)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_children_of_its_own():
    expected = web.extract(small_page(3), "", "resiliparse")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, b"y" if web.extract(small_page(3), "", "resiliparse") == expected
                     else b"n")  # fmt: skip
            web.close()
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"y"
    os.waitpid(pid, 0)
    assert web.extract(small_page(3), "", "resiliparse") == expected


def test_the_child_ends_with_its_parent():
    script = (
        "import os, signal; from data_beam.io.extract import web; "
        "web.extract('<p>hello</p>', '', 'resiliparse'); "
        "print(web._idle['resiliparse', 2 << 30][0].process.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} outlived its parent")


@pytest.mark.parametrize("timers", [True, False])
@pytest.mark.parametrize("work", ["while True: pass", "time.sleep(100)"])
def test_the_alarm_ends_a_process_with_and_without_kernel_timers(timers, work):
    """Windows has no timers of that kind; faulthandler's thread does it there."""
    script = (
        "import signal, time; from data_beam.io.extract import child; "
        + ("" if timers else "del signal.setitimer; ")
        + f"a = child.Alarm(); a.set(5); a.clear(); a.set(0.2)\n{work}"
    )
    begin = time.monotonic()
    code = subprocess.run([sys.executable, "-c", script], timeout=60).returncode
    assert time.monotonic() - begin < 40
    if timers and hasattr(signal, "setitimer"):
        assert code == -(signal.SIGPROF if "while" in work else signal.SIGALRM)
    else:
        assert code == 1


def test_pages_of_installed_documentation():
    """Real pages: nothing fails, and both methods find text in nearly all of them."""
    found = sorted(path for folder in ("/usr/share/doc", "/usr/share/gtk-doc", sys.prefix)
                   for path in glob.glob(f"{folder}/**/*.html", recursive=True)
                   if os.path.isfile(path) and 2000 < os.path.getsize(path) < 60_000)  # fmt: skip
    if len(found) < 10:
        pytest.skip("this machine has no documentation in HTML")
    for method in METHODS:
        texts = []
        for path in found[:: max(1, len(found) // 20)][:20]:
            with open(path, "rb") as handle:
                texts.append(web.extract(handle.read(), "", method)[0])
        assert sum(len(text) > 100 for text in texts) >= 0.8 * len(texts)
