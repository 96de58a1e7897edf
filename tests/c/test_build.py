"""The C library: which one is loaded, how it is compiled, what is measured, and how many threads run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import qwenkern
from qwenkern.cli import info
from qwenkern.errors import RequestError
from qwenkern.hub import download
from qwenkern.kernels import c as c_backend
from qwenkern.kernels.c import build, choose, compiler, kept, ops, targets, threads
from qwenkern.kernels.environment import CPU_TARGET, THREADS
from qwenkern.kernels.weights import Dense

ROOT = Path(qwenkern.__file__).parents[1]


RUN = compiler._run


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """As compiler._run, but an object file that was compiled before is copied."""
    folder = tmp_path_factory.mktemp("objects")

    def run(arguments, *others, **named):
        *command, made = arguments
        if command[-1] != "-o":  # it compiles no object
            return RUN(arguments, *others, **named)
        kept = folder / compiler.digest(*command)
        if not kept.exists():
            RUN(arguments, *others, **named)
            shutil.copy(made, kept)
        shutil.copy(kept, made)
        return ""

    return run


@pytest.fixture
def fresh(monkeypatch, tmp_path, compiled_once):
    """No library is loaded, the cache is empty, one target compiles fast, and measurements are fast."""
    monkeypatch.setattr(compiler, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in compiler.FLAGS))
    monkeypatch.setattr(compiler, "_run", compiled_once)
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("QWENKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(CPU_TARGET.name, targets.usable()[-1].name)
    monkeypatch.setattr(choose, "WEIGHTS", 1 << 18)
    monkeypatch.setattr(choose, "TOKENS", 17)  # many
    build.forget()
    kept._made.cache_clear()
    yield tmp_path / "cache" / "compiled"
    build.forget()
    kept._made.cache_clear()


@pytest.fixture
def agreeing(monkeypatch):
    """The readings of measurements agree, so what they choose is kept. On a busy machine they may not."""
    monkeypatch.setattr(choose, "_readings", lambda ways: {way: [1.0] * 4 for way in ways})


def runs() -> bool:
    """Whether an op runs in C with the right result."""
    x = torch.arange(64).reshape(2, 32).bfloat16()
    if c_backend.prepare() is not None:
        return False
    return torch.equal(ops.linear(x, Dense(x)), x @ x.T)


def of_this_test(warned) -> list:
    """The warnings, without those about files and sockets of other tests that are collected meanwhile."""
    return [each for each in warned if not issubclass(each.category, ResourceWarning)]


# Targets

HASWELL = targets._V3
ZEN4 = targets._V4 | {"avx512_vnni", "avx512_bf16"}


@pytest.mark.parametrize(
    ("machine", "has", "best"),
    [
        ("x86_64", ZEN4, ["x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v4", "x86-64-v3", "native"]),
        ("x86_64", targets._V4, ["x86-64-v4", "x86-64-v3", "native"]),
        ("x86_64", HASWELL | {"avx_vnni"}, ["x86-64-v3-vnni", "x86-64-v3", "native"]),
        ("AMD64", HASWELL | {"avx512f"}, ["x86-64-v3", "native"]),
        ("x86_64", HASWELL - {"abm"}, ["native"]),
        ("aarch64", targets._ARM | {"bf16", "i8mm", "sve"}, ["armv8.6-bf16", "armv8.2-dotprod", "native"]),
        ("arm64", targets._ARM, ["armv8.2-dotprod", "native"]),
        ("aarch64", {"asimd"}, ["native"]),
        ("riscv64", {"v"}, ["native"]),
    ],
)
def test_a_processor_gets_the_best_that_it_has(monkeypatch, machine, has, best):
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "features", lambda: frozenset(has))
    monkeypatch.delenv(CPU_TARGET.name, raising=False)
    assert [target.name for target in targets.usable()] == best
    monkeypatch.setenv(CPU_TARGET.name, best[0])
    assert [target.name for target in targets.usable()] == best[:1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "x86-64-v4-bf16",
            r"is 'x86-64-v4-bf16'.*lacks avx512_bf16, avx512_vnni, avx512f; expected another of.*native",
        ),
        ("armv8.2-dotprod", r"is 'armv8.2-dotprod'; expected one of x86-64-v4-bf16, x86-64-v4-vnni, .*native"),
        ("v3", r"is 'v3'; expected one of"),
    ],
)
def test_a_target_that_cannot_be_forced_is_an_error(monkeypatch, name, said):
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(targets, "features", lambda: ZEN4 - {"avx512_vnni", "avx512_bf16", "avx512f"})
    monkeypatch.setenv(CPU_TARGET.name, name)
    build.forget()
    with pytest.raises(ValueError, match=said):
        c_backend.library()
    with pytest.raises(RequestError, match=said):
        qwenkern.Model.from_config("qwen2.5-0.5b", device="cpu")
    build.forget()


@pytest.mark.skipif(targets.machine() != "x86_64", reason="an option of gcc for x86-64")
@pytest.mark.parametrize("target", [*targets.TARGETS, targets.native()], ids=lambda target: target.name)
def test_gcc_fuses_every_product_with_its_sum(target):
    """gcc tunes for some processors by splitting the fused multiply-adds of some loops. A sum would then depend on the
    loop, and decode steps would not be batch-invariant."""
    if target.machine != "x86_64" or not shutil.which("gcc"):
        pytest.skip("for another machine, or gcc is missing")
    command = ["gcc", *target.flags, "-Q", "--help=params"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"avoid-fma-max-bits=\S*\s+(\d+)", listed) == ["0"]


def test_features_are_those_that_all_cores_have(tmp_path):
    file = tmp_path / "cpuinfo"
    assert targets.listed(file) == frozenset()
    file.write_text("processor : 0\nFeatures : asimd bf16\n\nprocessor : 1\nFeatures : asimd\n")
    assert targets.listed(file) == {"asimd"}
    file.write_text("processor : 0\nmodel name : flags of no kind\nflags\t\t: fma avx2\nvmx flags : ept\n")
    assert targets.listed(file) == {"fma", "avx2"}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_what_torch_sees_of_this_processor_is_seen_here():
    """torch asks the processor itself."""
    if targets.machine() == "x86_64":
        asked = {"avx2": torch.cpu._is_avx2_supported(), "avx512f": torch.cpu._is_avx512_supported()}
        asked["avx512_bf16"] = torch.cpu._is_avx512_bf16_supported()
        assert {name: name in targets.features() for name in asked} == asked
    else:
        assert "asimd" in targets.features()


# What is loaded


def test_a_checkout_compiles_once_and_then_loads(fresh, monkeypatch, caplog):
    assert runs()
    assert c_backend.target() == os.environ[CPU_TARGET.name]
    assert "compiling the C kernels" in caplog.text
    assert fresh.stat().st_mode & 0o777 == (0o755 if os.getuid() == 0 else 0o700)
    [library] = fresh.glob("*.so")
    said = json.loads(library.with_suffix(".json").read_text())
    assert said["sources"] == compiler.digest()
    caplog.clear()
    build.forget()
    monkeypatch.setattr(compiler, "compile_to", None)
    assert runs()
    assert "compiling" not in caplog.text
    assert "compiled on this machine" in c_backend.describe()["CPU"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "manifest", "another's", "planted"])
def test_a_kept_library_that_is_not_what_it_was_is_compiled_anew(fresh, caplog, damage):
    assert runs()
    [library] = fresh.glob("*.so")
    content, manifest = library.read_bytes(), library.with_suffix(".json")
    library.unlink()  # it is mapped: truncating it would end this process
    library.write_bytes({"truncated": content[:-100], "garbage": b"\x7fELF" * 100}.get(damage, content))
    library.chmod(0o777 if damage == "another's" else 0o700)
    if damage == "planted":
        if os.getuid() != 0:
            pytest.skip("only root may give a file away")
        os.chown(library, 4242, 4242)
    if damage == "manifest":
        manifest.write_text('{"library": []')
    caplog.clear()
    build.forget()
    assert runs()
    reasons = {"manifest": "missing or damaged", "another's": "another user's", "planted": "another user's"}
    assert reasons.get(damage, "is damaged") in caplog.text
    assert library.read_bytes() == content
    assert kept.trusted(library)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".so", ".json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_not_waited_for(fresh, kind, suffix):
    assert runs()
    [library] = fresh.glob("*.so")
    odd = library.with_suffix(suffix)
    odd.unlink()
    {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": lambda path: path.symlink_to(path)}[kind](odd)
    build.forget()
    assert runs()


@pytest.mark.slow
@pytest.mark.parametrize("manifest", ["{}", "[]", "null", '"x"', '{"sources": 1}', "[" * 100_000, "\xff", ""])
def test_an_odd_manifest_is_damaged(fresh, caplog, manifest):
    assert runs()
    [library] = fresh.glob("*.so")
    library.with_suffix(".json").write_bytes(manifest.encode("latin-1"))
    build.forget()
    assert runs()
    assert "is missing or damaged" in caplog.text


@pytest.mark.parametrize(
    ("cc", "said"),
    [
        ("no-such-compiler -O1", r"the C compiler no-such-compiler cannot be run: No such file"),
        ('gcc "-O2', r"""CC is 'gcc "-O2', which is no command line: No closing quotation"""),
        ("false", r"the C compiler false failed with exit code 1"),
        ("sh -c 'exec sleep 60'", r"the C compiler sh did not answer within"),
        ("sh -c 'test $1 = --version || echo fatal error: of mine >&2; exit 9' x", r"sh failed with exit code 9"),
    ],
)
def test_a_compiler_that_does_not_work_is_one_line_and_torch_runs(fresh, monkeypatch, cc, said):
    monkeypatch.setenv("CC", cc)
    if "sleep" in cc:
        monkeypatch.setattr(compiler, "ANSWER", 0.5)
    compiler._asked.cache_clear()
    with pytest.warns(UserWarning, match=said + ".*torch runs in place of C, slower") as warned:
        assert not runs()
    assert not runs()  # and says no more
    [one] = of_this_test(warned)
    assert "\n" not in str(one.message)
    assert "torch" in c_backend.describe()["CPU"]


def test_where_the_best_target_does_not_compile_the_next_one_runs(fresh, monkeypatch):
    """A compiler that is older than the processor."""
    monkeypatch.delenv(CPU_TARGET.name)
    odd = targets.Target("odd", targets.machine(), ("-march=of-tomorrow",), frozenset(), floats="native")
    monkeypatch.setattr(targets, "usable", lambda: [odd, targets.native()])
    with pytest.warns(UserWarning, match=r"failed with exit code 1: .*of-tomorrow.*; the C functions for native run"):
        assert runs()


def test_without_the_rival_there_is_no_choice(fresh, monkeypatch, recwarn):
    native = targets.native()._replace(floats="odd")
    odd = targets.Target("odd", targets.machine(), ("-march=of-tomorrow",))
    monkeypatch.setattr(targets, "usable", lambda: [native, odd])
    monkeypatch.setattr(choose, "products", None)
    assert runs()
    assert c_backend.target() == "native"
    assert not of_this_test(recwarn.list)


@pytest.mark.parametrize("kind", ["a file", "no home", "another's", "full"])
def test_a_cache_that_cannot_be_used_ends_nothing(fresh, monkeypatch, caplog, kind):
    if kind == "a file":
        fresh.parent.write_text("")
    elif kind == "no home":
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("nobody's home")))
    elif kind == "another's":
        fresh.mkdir(parents=True)
        monkeypatch.setattr(kept.os, "getuid", lambda: 4242)
        stat, theirs = Path.stat, os.stat_result((0o40777, 0, 0, 1, 99, *[0] * 5))
        monkeypatch.setattr(Path, "stat", lambda path, **options: theirs if path == fresh else stat(path, **options))
    else:
        real = os.replace
        monkeypatch.setattr(
            os,
            "replace",
            lambda a, b: real(a, b) if fresh not in Path(b).parents else (_ for _ in ()).throw(OSError(28, "full")),
        )
    assert runs()
    assert "in " + str(fresh) in caplog.text
    assert not list(fresh.parent.glob("compiled/*.so"))
    assert not [record for record in caplog.records if "compiler" in record.getMessage()]


# What is compiled


def test_no_array_on_the_stack_grows_with_what_is_given():
    for file in compiler.files():
        if file.suffix == ".c":
            flags = ["-Wvla", "-Werror=vla", "-Walloca", "-Werror=alloca", *targets.native().flags]
            subprocess.run([*compiler.command(), *flags, "-fsyntax-only", str(file)], check=True, capture_output=True)


def test_a_row_of_a_normed_linear_may_have_any_length():
    """Nothing of a row's length lies on a stack, which in a thread may be small."""
    code = """
import threading, torch
threading.stack_size(1 << 20)
from qwenkern import kernels
from qwenkern.kernels import c as c_backend, reference
x = torch.ones(1, 8 << 20, dtype=torch.bfloat16)
assert c_backend.prepare() is None
def run():
    print(kernels.norm_linear(x, x[0], 1e-6, x[:, :1].expand(1, 8 << 20).contiguous()).item())
for team in (1, 2):
    torch.set_num_threads(team)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""
    hidden = ("TRITON_INTERPRET", "QWENKERN_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == [str(float(8 << 20))] * 2, (done.returncode, done.stderr)


# Where it is kept


def test_whatever_the_umask_nobody_else_may_write(fresh, monkeypatch):
    before = os.umask(0)
    try:
        assert runs()
        choose.remember("prefetch", [0, 1], 1)
    finally:
        os.umask(before)
    assert len(list(fresh.iterdir())) >= 3
    for each in (fresh, *fresh.iterdir()):
        assert kept.trusted(each), each
        assert os.access(each, os.R_OK)
    monkeypatch.setattr(compiler, "compile_to", None)
    build.forget()
    assert runs()


@pytest.mark.parametrize(("user", "mode"), [(0, 0o755), (4242, 0o700)])
def test_what_root_makes_others_may_read(fresh, monkeypatch, user, mode):
    """An image that root builds and that runs as another user."""
    monkeypatch.setattr(kept.os, "getuid", lambda: user)
    monkeypatch.setattr(kept, "trusted", lambda path: True)
    assert kept.folder().stat().st_mode & 0o777 == mode


ANOTHER_USER = """
import os
import re
import torch
from qwenkern.kernels import c as c_backend
from qwenkern.kernels.c import choose, compiler
compiler.FLAGS = tuple(flag.replace("-O3", "-O0") for flag in compiler.FLAGS)
choose.WEIGHTS = 1 << 18
os.setgroups([])
os.setresgid(4242, 4242, 4242)
os.setresuid(4242, 4242, 4242)
print(c_backend.prepare(), c_backend.prepared().origin)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize(("mode", "origin"), [(0o755, "compiled on this machine"), (0o700, "for this process only")])
def test_another_user_runs_from_what_root_has_made(fresh, mode, origin):
    assert runs()
    with tempfile.TemporaryDirectory() as place:  # where another user may look, as into no folder of pytest's
        os.chmod(place, 0o755)
        made = shutil.copytree(fresh, Path(place, "compiled"))
        os.chmod(made, mode)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"QWENKERN_CACHE": place} | ({"PATH": ""} if mode == 0o755 else {})
        command = [sys.executable, "-c", ANOTHER_USER]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.startswith("None"), done.stderr
        assert origin in done.stdout
        assert ("it cannot be read" in done.stderr) == (mode == 0o700)


def test_a_warm_cache_needs_no_compiler(fresh, monkeypatch, recwarn):
    """Nor the one that filled it: an image without any runs what another has compiled."""
    best = targets.usable()[0]._replace(name="odd", needs=frozenset({"anything"}), floats=None)
    monkeypatch.setattr(targets, "usable", lambda: [best])
    assert runs()
    for cc in ("", "no-such-compiler", "gcc '"):
        monkeypatch.setenv("CC", cc)
        monkeypatch.setenv("PATH", "")
        compiler._asked.cache_clear()
        build.forget()
        assert runs()
        assert c_backend.describe()["CPU"].startswith("C for odd, compiled on this machine")
    assert not of_this_test(recwarn.list)
    [library] = fresh.glob("*.so")
    library.unlink()  # it is mapped: truncating it would end this process, at its next fork
    library.write_bytes(b"something else")
    build.forget()
    with pytest.warns(UserWarning, match="gcc '"):
        assert not runs()


def test_a_folder_that_is_only_read_is_used(fresh, agreeing, monkeypatch, caplog):
    assert runs()
    monkeypatch.setattr(os, "replace", _read_only)
    monkeypatch.setattr(os, "utime", _read_only)
    monkeypatch.setattr(compiler, "compile_to", None)
    for file in fresh.iterdir():
        os.chmod(file, 0o444)
    build.forget()
    caplog.clear()
    assert runs()
    assert not caplog.records


def _read_only(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(("own", "shared", "expected"), [
    ("own", "", "own"), ("~/own", "", "home/own"), ("", "", "home/.cache/qwenkern"),
    ("", "relative", "home/.cache/qwenkern"), ("", "{}/xdg", "xdg/qwenkern"),
])  # fmt: skip
def test_the_folder_is_the_one_of_downloads(fresh, monkeypatch, tmp_path, own, shared, expected):
    monkeypatch.chdir(tmp_path)
    for name, value in {"QWENKERN_CACHE": own, "XDG_CACHE_HOME": shared, "HOME": f"{tmp_path}/home"}.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert kept.folder() == tmp_path / expected / "compiled"
    assert download.cache_dir() == tmp_path / expected
    monkeypatch.chdir("/")
    assert kept.folder() == tmp_path / expected / "compiled"


def test_the_compiler_needs_no_other_folder(fresh, monkeypatch):
    """A read-only system may have nowhere for its temporary files."""
    monkeypatch.setattr(compiler, "_run", RUN)
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    assert runs()


def test_what_nobody_used_for_long_goes_when_something_new_comes(fresh):
    fresh.mkdir(parents=True)
    long_ago, names = time.time() - 31 * kept.DAY, []
    for name in (
        "0123456789abcdef-x86-64-v3.so",
        "0123456789abcdef-x86-64-v3.json",
        "choice-prefetch-0123456789abcdef.json",
    ):
        (fresh / name).write_text("")
        os.utime(fresh / name, (long_ago, long_ago))
    (fresh / "making-x").mkdir()
    os.utime(fresh / "making-x", (long_ago, long_ago))
    for name in ("notes.txt", "0123456789abcdef-x86-64-v3.so.bak", "choice.json"):
        (fresh / name).write_text("")
        os.utime(fresh / name, (long_ago, long_ago))
        names.append(name)
    recent = fresh / "fedcba9876543210-x86-64-v4.so"
    recent.write_text("")
    assert runs()
    left = {file.name for file in fresh.iterdir()}
    assert {
        name for name in left if not name.startswith("choice-") and build._key(targets.usable()[-1]) not in name
    } == {
        *names,
        recent.name,
    }


def test_what_is_used_stays(fresh, agreeing):
    assert runs()
    long_ago = time.time() - 31 * kept.DAY
    for file in fresh.iterdir():
        os.utime(file, (long_ago, long_ago))
    build.forget()
    assert runs()
    kept.tidy(fresh)
    assert list(fresh.glob("*.so"))
    assert list(fresh.glob("choice-prefetch-*"))


# What is measured


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [([1.0, 9, 1.1, 9], [1.2, 9, 1.2, 9], ("ours", True)), ([1.0, 1.3, 1.1, 1.3], [1.2] * 4, ("ours", False))],
)
def test_readings_agree_where_both_halves_choose_the_same(ours, theirs, expected):
    assert choose.decide({"ours": ours, "theirs": theirs}, choose._fastest) == expected


TARGET, BOTH = targets.native(), ("pairs", "floats")
SECONDS = {"pairs": 1.0, "floats": 2.0, "torch": 1.5, 0: 1.0, 4096: 0.9, 16384: 0.88}


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ({}, ("pairs", True, 4096)),
        ({"pairs": 2.1}, ("floats", False, 4096)),
        ({"torch": 0.95}, ("pairs", True, 4096)),
        ({4096: 0.98, 16384: 0.99}, ("pairs", True, 0)),
    ],
)
def test_the_fastest_is_chosen_and_remembered(fresh, monkeypatch, differs, expected):
    c_backend.prepare()
    loaded = [build.Loaded(*c_backend.prepared()[:4])._replace(target=TARGET._replace(name=name)) for name in BOTH]
    shutil.rmtree(fresh)
    fresh.mkdir()
    monkeypatch.setattr(choose, "_readings", lambda ways: {way: [(SECONDS | differs)[way]] * 4 for way in ways})

    def chosen() -> tuple:
        products = choose.products(dict(zip(BOTH, loaded, strict=True)))
        best = loaded[BOTH.index(products)]
        return products, choose.multiplies(best), choose.prefetch(best)

    assert chosen() == expected
    assert len(list(fresh.iterdir())) == 3
    monkeypatch.setattr(choose, "_readings", None)
    assert chosen() == expected


def test_a_choice_is_kept_with_its_day_and_the_load(fresh, agreeing, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 1, 1))
    assert runs()
    assert "load 7.2" in choose.measured["prefetch"]
    said = c_backend.describe()["weights"]
    assert said.endswith(f"(measured {time.strftime('%Y-%m-%d')}, load 7.2)")
    build.forget()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0, 0))
    monkeypatch.setattr(choose, "_readings", None)
    assert c_backend.describe()["weights"] == said


def test_everything_is_measured_anew_when_asked(fresh, monkeypatch):
    seconds = {0: 1.0, 4096: 0.5, 16384: 0.4}
    monkeypatch.setattr(choose, "_readings", lambda ways: {way: [seconds.get(way, 1.0)] * 4 for way in ways})
    assert c_backend.describe()["weights"].startswith("prefetched 16384 bytes")
    seconds[0] = 0.3
    found = info.renewed()
    assert found["weights"].startswith("not prefetched (measured")
    assert found["weights"].endswith("before: prefetched 16384 bytes in advance")
    assert found["threads"].endswith("as before")
    build.forget()
    monkeypatch.setattr(choose, "_readings", None)
    assert c_backend.describe()["weights"].startswith("not prefetched")


def test_a_doubtful_measurement_is_used_and_not_kept(fresh, monkeypatch, caplog):
    c_backend.prepare()
    loaded = build.Loaded(*c_backend.prepared()[:4])
    caplog.set_level("INFO")
    noisy = {0: [1.0, 1.0, 1.0, 1.0], 4096: [0.9, 2.0, 0.9, 2.0], 16384: [2.0] * 4}
    monkeypatch.setattr(choose, "_readings", lambda ways: noisy)
    monkeypatch.setattr(choose, "remembered", lambda *_: None)
    shutil.rmtree(fresh)
    fresh.mkdir()
    assert choose.prefetch(loaded) == 4096
    assert not list(fresh.iterdir())
    assert "readings disagree" in caplog.text


def test_what_is_measured_runs(fresh):
    c_backend.prepare()
    loaded = build.Loaded(*c_backend.prepared()[:4])
    assert choose.products({"only": loaded}) == "only"
    assert choose.prefetch(loaded) in choose.DISTANCES
    assert choose.multiplies(loaded) in (True, False)


@pytest.mark.parametrize("damaged", ["{", "[]", '{"answer": 5}', '{"answer": true}', '{"answer": [0]}', "[" * 100000])
def test_a_damaged_choice_is_measured_anew(fresh, damaged):
    fresh.mkdir(parents=True)
    choose.remember("prefetch", [0, 4096], 4096)
    [file] = fresh.iterdir()
    assert choose.remembered("prefetch", [0, 4096]) == 4096
    assert choose.remembered("prefetch", [0, 8192]) is None
    file.write_text(damaged)
    assert choose.remembered("prefetch", [0, 4096]) is None
    file.unlink()
    os.mkfifo(file)
    assert choose.remembered("prefetch", [0, 4096]) is None


# Threads


@pytest.fixture
def torch_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_asked", None)
    monkeypatch.delenv(THREADS.name, raising=False)
    yield
    torch.set_num_threads(before)


def test_threads_follow_torch_up_to_the_cores(torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: 3)
    for torchs, expected in ((1, 1), (2, 2), (8, 3)):
        torch.set_num_threads(torchs)
        assert threads.count() == expected
    monkeypatch.setenv(THREADS.name, "5")
    assert threads.count() == 5
    threads.use(2)
    assert threads.count() == torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert threads.count() == 1


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", " ", "²"])
def test_a_number_of_threads_is_a_whole_one(torch_threads, monkeypatch, given):
    monkeypatch.setenv(THREADS.name, given)
    with pytest.raises(ValueError, match=f"QWENKERN_THREADS is '{given}'; expected a whole number from 1 to 1024"):
        threads.count()
    with pytest.raises(RequestError, match="QWENKERN_THREADS"):
        qwenkern.Model.from_config("qwen2.5-0.5b", device="cpu")


@pytest.mark.parametrize("given", [0, -1, "2", 1.0, True])
def test_threads_of_a_model_are_a_whole_number(torch_threads, given):
    before = torch.get_num_threads()
    with pytest.raises(RequestError, match=r"threads is .*; expected a whole number from 1 to 1024"):
        qwenkern.Model.from_config("qwen2.5-0.5b", device="cpu", threads=given)
    assert torch.get_num_threads() == before


def test_a_model_sets_the_threads_of_the_process(torch_threads):
    config = qwenkern.Config(64, 32, 48, 1, 2, 1, 16, max_position_embeddings=128)
    qwenkern.Model.from_config(config, device="cpu", threads=3)
    assert threads.count() == torch.get_num_threads() == 3


def test_two_threads_of_a_core_count_once(tmp_path):
    for processor, siblings in enumerate(["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]):
        topology = tmp_path / f"cpu{processor}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.physical_cores(frozenset(range(8)), tmp_path) == 4
    assert threads.physical_cores(frozenset({0, 4}), tmp_path) == 1
    assert threads.physical_cores(frozenset({0, 1, 6}), tmp_path) == 3
    assert threads.physical_cores(frozenset({8, 9}), tmp_path) == 2  # not listed


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, 1),
        ("0::/host/path\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("4:memory:/x\n1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (
            "1:cpu,cpuacct:/j\n",
            {"cpu,cpuacct/j/cpu.cfs_quota_us": "250000", "cpu,cpuacct/j/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("1:cpuacct,cpu:/docker/1\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("1:cpuset:/j\n", {"cpuset/j/cpu.max": "1 1"}, None),
    ],
)
def test_a_cgroups_quota_is_rounded_up(tmp_path, groups, limits, expected):
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    process.write_text(groups)
    for name, content in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    assert threads.cgroup_quota(process, root) == expected


def test_no_cgroups_are_no_limit(tmp_path):
    assert threads.cgroup_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
def test_a_process_on_one_processor_has_one_thread():
    code = """
import os
import re
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as taskset does
import torch
torch.set_num_threads(4)
from qwenkern.kernels import c as c_backend
print(c_backend.threads.count())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


# The wheel


# As in `fresh`: it compiles fast, and measurements are fast.
QUICK = (("compiler.py", '"-O3"', '"-O0"'), ("choose.py", "WEIGHTS = 128 << 20", "WEIGHTS = 1 << 18"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder with the package installed from a wheel that was built from a copy of these files."""
    folder = tmp_path_factory.mktemp("wheel")
    source, place = folder / "source", folder / "place"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "qwenkern_start.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qwenkern", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name, old, new in QUICK:
        file = source / "kernels" / "c" / name
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "-q"]
    environment = os.environ | {"QWENKERN_REQUIRE_C": "1", "PIP_NO_INDEX": "1"}
    build_wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build_wheel, check=True, env=environment, cwd=folder)
    [wheel] = folder.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert "-any" not in wheel.name
    install = [*pip, "install", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run(install, check=True, env=environment, cwd=folder)
    return place


def _in_c(place: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """An op of the installed package in a process of its own: where it ran from, and what was said."""
    environment = {"PYTHONPATH": str(place), "QWENKERN_CACHE": str(cache), **environment}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QWENKERN_") and name != "CC"}
    program = [sys.executable, str(ROOT / "tests" / "c" / "installed_wheel.py")]
    return subprocess.run(program, capture_output=True, text=True, check=True, env=inherited | environment, cwd=cache)


fits_here = pytest.mark.skipif(len(targets.usable()) == 1, reason="no fixed target fits this processor")


@pytest.mark.slow
@fits_here
@pytest.mark.xdist_group("wheel")
def test_an_installed_wheel_needs_no_compiler(installed, tmp_path):
    done = _in_c(installed, tmp_path, CC="false")
    file, said = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert "built with the package" in said
    assert not list(tmp_path.rglob("*.so"))
    assert not _warnings(done)


def _warnings(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr, but for the one that a busy machine prints because it takes long to measure."""
    return [line for line in done.stderr.splitlines() if "measuring which C kernels are fastest" not in line]


@pytest.mark.slow
@fits_here
@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("damage", ["library", "sources", "manifest"])
def test_a_built_library_that_is_not_what_it_was_is_compiled_here(installed, tmp_path, damage):
    place = tmp_path / "place"
    shutil.copytree(installed, place)
    name, folder = targets.usable()[-2].name, place / "qwenkern" / "kernels" / "c"
    library = folder / "built" / f"{name}.so"
    if damage == "library":
        library.write_bytes(library.read_bytes()[:-1] + b"x")
    elif damage == "sources":
        (folder / "team.h").open("a").write("/* changed */\n")
    else:
        library.with_suffix(".json").unlink()
    reasons = {"library": "is damaged", "sources": "from other sources", "manifest": "is missing or damaged"}
    done = _in_c(place, tmp_path, QWENKERN_CPU_TARGET=name)
    assert f"{name}, compiled on this machine" in done.stdout
    first, second = _warnings(done)
    assert reasons[damage] in first
    assert "compiling the C kernels" in second


def test_an_editable_install_builds_nothing():
    assert not (ROOT / "kernels" / "c" / "built").exists()
