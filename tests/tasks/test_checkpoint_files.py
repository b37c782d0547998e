"""What people and trainers save: names, ties and buffers fitted to the model, and files that are no weights."""

import io
import json
import os
import pickle
import pickletools
import re
import struct
import tarfile
import types
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from reference import gradients, scores
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gradindex
from gradindex.errors import CheckpointError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toys.mlp()


def saved(folder, content, name="w_3.pt", **options):
    torch.save(content, folder / name)
    return gradindex.Checkpoint(folder / name, learning_rate=0.1, **options)


def same(found, model):
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def named(model, rename):
    return {rename(name): tensor for name, tensor in model.state_dict().items()}


class Deeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(toys.mlp() for _ in range(2))
        self.head = nn.Linear(3, 2)


WRAPPED = {
    "_orig_mod.module.": "", "module._orig_mod.": "", "model._orig_mod.": "", "_orig_mod.model.": "",
    "module.model._orig_mod.": "", "module.module.": "", "_forward_module.model.": "",
    "_fsdp_wrapped_module._checkpoint_wrapped_module.": "", "net.": "", "encoder.backbone.": "",
}  # fmt: skip


@pytest.mark.parametrize("before", WRAPPED)
def test_wrappers_and_prefixes_in_every_order_do_not_count(tmp_path, before):
    saved(tmp_path, named(toys.randomise(other := Deeper()) or other, lambda name: before + name))
    assert same(gradindex.Checkpoint(tmp_path / "w_3.pt", 0.1).load(Deeper()), other)


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_wrappers_inside_of_names_do_not_count(tmp_path, part):
    other = Deeper()
    found = saved(tmp_path, named(other, lambda name: re.sub(r"^layers\.(\d)\.", rf"layers.\1.{part}.", name)))
    assert same(found.load(Deeper()), other)


def test_a_wrapped_model_takes_plain_weights_and_the_other_way_about(tmp_path, model):
    plain, wrapped = saved(tmp_path, model.state_dict()), nn.DataParallel(model)
    assert same(plain.load(nn.DataParallel(toys.mlp())), wrapped)
    compiled = saved(tmp_path, named(model, lambda name: f"_orig_mod.{name}"), "w_4.pt")
    assert same(compiled.load(nn.DataParallel(toys.mlp())), wrapped)


def test_an_averaged_model_is_read_as_the_model(tmp_path, model):
    averaged = AveragedModel(model)
    toys.randomise(model)
    averaged.update_parameters(model)
    loaded = saved(tmp_path, averaged.state_dict()).read(toys.mlp())
    assert same(loaded.tensors, averaged.module)
    assert loaded.passed_over == ("n_averaged",)


BESIDE = {
    "criterion": {"criterion.pos_weight": torch.ones(3)},
    "a loss": {"loss_fn.weight": torch.ones(3), "train_acc.correct": torch.tensor(3)},
    "a metric": {"val_metrics.total": torch.tensor(0.5)},
    "another network": {"teacher.weight": torch.ones(3, 3), "queue": torch.ones(2, 8)},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("prefix", [None, "model.", "model"])
def test_a_prefix_chooses_the_names_that_have_it(tmp_path, model, beside, prefix):
    found = saved(tmp_path, {"state_dict": {**named(model, lambda n: f"model.{n}"), **BESIDE[beside]}}, prefix=prefix)
    loaded = found.read(toys.mlp())
    assert same(loaded.tensors, model)
    assert set(loaded.passed_over) == set(BESIDE[beside])


def test_of_a_student_and_a_teacher_one_must_be_chosen(tmp_path, model):
    teacher = toys.mlp()
    content = named(model, lambda n: f"student.{n}") | named(teacher, lambda n: f"teacher.{n}")
    with pytest.raises(
        CheckpointError, match=r"weights 2 times, under 'student\.' and 'teacher\.'\. Choose one.*prefix="
    ):
        saved(tmp_path, content).load(toys.mlp())
    assert same(saved(tmp_path, content, prefix="teacher.").load(toys.mlp()), teacher)


def test_of_weights_and_their_average_the_weights_are_taken(tmp_path, model):
    content = named(model, lambda n: f"model.{n}") | named(toys.mlp(), lambda n: f"model_ema.module.{n}")
    assert same(saved(tmp_path, content).load(toys.mlp()), model)


def test_a_prefix_that_nothing_has_is_an_error(tmp_path, model):
    with pytest.raises(
        CheckpointError, match=r"no name that starts with prefix 'encoder'; its names are 0\.weight, 0\.bias"
    ):
        saved(tmp_path, model.state_dict(), prefix="encoder").load(model)


class Tied(nn.Module):
    """Two layers with one weight, and buffers of every kind."""

    def __init__(self, buffers=True):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.decode = nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight
        if buffers:
            self.register_buffer("position_ids", torch.arange(5)[None])
            self.register_buffer("inv_freq", torch.rand(3))

    def forward(self, x):
        return self.decode(self.norm(self.embed(x)))


@pytest.mark.parametrize("left_out", ["decode.weight", "embed.weight"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_tied_parameter_comes_from_its_twin(tmp_path, left_out, suffix):
    other, path = Tied(), tmp_path / f"w_1{suffix}"
    content = {name: tensor.clone() for name, tensor in other.state_dict().items() if name != left_out}
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    loaded = gradindex.Checkpoint(path, 0.1).read(Tied())
    other.inv_freq, expected = other.inv_freq, other
    assert same(loaded.tensors, expected)
    assert loaded.filled == (left_out,)


def test_tied_parameters_with_different_numbers_are_refused(tmp_path):
    content = {**Tied().state_dict(), "decode.weight": torch.ones(7, 4)}
    with pytest.raises(
        CheckpointError, match=r"different numbers in embed\.weight and decode\.weight, but they are one"
    ):
        saved(tmp_path, content).load(Tied())


def test_an_untied_model_does_not_fill_its_missing_layer(tmp_path):
    model = Tied()
    model.decode.weight = nn.Parameter(torch.ones(7, 4))
    content = {name: tensor for name, tensor in Tied().state_dict().items() if name != "decode.weight"}
    with pytest.raises(CheckpointError, match=r"decode\.weight is missing\. Check"):
        saved(tmp_path, content).load(model)


def test_idle_buffers_that_one_side_has_are_filled_or_passed_over(tmp_path):
    model, other = Tied(), Tied(buffers=False)
    content = {name: tensor for name, tensor in other.state_dict().items() if "num_batches" not in name}
    loaded = saved(tmp_path, content).read(model)
    assert loaded.filled == ("position_ids", "inv_freq", "norm.num_batches_tracked")
    assert torch.equal(loaded.tensors["inv_freq"], model.inv_freq)
    assert loaded.tensors["inv_freq"] is not model.inv_freq
    loaded = saved(tmp_path, {**model.state_dict(), "attn.masked_bias": torch.tensor(-1e4)}).read(Tied(buffers=False))
    assert set(loaded.passed_over) == {"position_ids", "inv_freq", "attn.masked_bias"}


@pytest.mark.parametrize("name", ["norm.running_mean", "norm.running_var", "norm.weight", "embed.weight"])
def test_what_training_left_is_never_filled(tmp_path, name):
    content = {key: tensor for key, tensor in Tied().state_dict().items() if key not in (name, "decode.weight")}
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is missing"):
        saved(tmp_path, content).load(Tied())


@pytest.mark.parametrize("extra", ["0.scale", "3.weight", "head.bias", "norm.running_mean"])
def test_a_parameter_that_the_model_does_not_have_is_never_passed_over(tmp_path, model, extra):
    with pytest.raises(CheckpointError, match=rf"{re.escape(extra)} is not in the model"):
        saved(tmp_path, {**model.state_dict(), extra: torch.ones(3)}).load(toys.mlp())


def test_scores_of_a_tied_model_equal_autograd_and_what_was_filled_is_told(tmp_path, capsys):
    class Words(Tied):
        def forward(self, x):
            return super().forward(x)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    task = toys.make_task(
        tmp_path, Words(), loss=loss, train=[(torch.tensor(i % 7), i % 5) for i in range(9)], query=None
    )
    checkpoints = []
    for item in task.checkpoints:
        weights = {name: tensor for name, tensor in torch.load(item.path).items() if name != "decode.weight"}
        weights = {f"model.{name}": tensor for name, tensor in weights.items()} | {"criterion.w": torch.ones(2)}
        path = tmp_path / f"tied_{item.step}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        checkpoints.append(replace(item, path=path))
    partial = replace(task, checkpoints=checkpoints)
    store = gradindex.build(partial, tmp_path / "store")
    said = [line for line in capsys.readouterr().err.splitlines() if "tied" in line]
    assert len(said) == 1
    assert re.search(
        r"tied_0\.safetensors \(like 2 others\) lacks decode\.weight, filled in from .*has criterion\.w that", said[0]
    )
    for item in store.manifest.map.checkpoints:
        assert (item.filled, item.passed_over) == (("decode.weight",), ("criterion.w",))
    hits = gradindex.load(partial, store.folder).proponents([0, 3], k=9, source="train")
    of_all = gradients(task, task.train)
    expected, size = scores(task, of_all[[0, 3]], of_all, toys.RATES)
    for ids, found, row, norms in zip(hits.ids, hits.scores, expected, size, strict=True):
        assert (abs(found - row[ids]) < 1e-5 * norms[ids]).all()


def test_a_plain_store_says_nothing_of_names(tmp_path, capsys):
    store = gradindex.build(toys.make_task(tmp_path), tmp_path / "store")
    assert capsys.readouterr().err == ""
    keys = {"sha256", "step", "weighting", "learning_rates"}
    assert all(set(item.to_json()) == keys for item in store.manifest.map.checkpoints)


def pipe(path):
    os.mkfifo(path)


def forged(claims):
    def write(path):
        header = json.dumps(claims).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)

    return write


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def archive(**files):
    def write(path):
        with zipfile.ZipFile(path, "w") as made:
            for name, content in files.items():
                made.writestr(name.replace("_", "."), content)

    return write


def tar(path):
    with tarfile.open(path, "w") as made:
        made.addfile(tarfile.TarInfo("weights"), io.BytesIO())


def legacy(content, change=lambda raw: raw):
    def write(path):
        torch.save(content, path, _use_new_zipfile_serialization=False)
        path.write_bytes(change(path.read_bytes()))

    return write


def script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def flipped(raw):
    return raw[:60] + bytes([raw[60] ^ 0xFF]) + raw[61:]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


WEIGHTS = {"0.weight": torch.ones(5, 6)}
NO_CHECKPOINTS = {
    "a folder": ("w.pt", lambda path: path.mkdir(), "is a folder without weights that gradindex knows: it is empty"),
    "a pipe": ("w.pt", pipe, "is a pipe, but a checkpoint must be a regular file"),
    "a safetensors pipe": ("w.safetensors", pipe, "is a pipe"),
    "empty": ("w.pt", lambda path: path.touch(), r"truncated or damaged \(it is empty\)"),
    "empty safetensors": ("w.safetensors", lambda path: path.touch(), "truncated or damaged"),
    "text": ("w.pt", lambda path: path.write_text("<html>404 not found</html>"), "is a text file, not a checkpoint"),
    "Git LFS": ("w.pt", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "a zip": ("w.pt", archive(notes_txt="mine"), r"is a zip file that torch.save did not write"),
    "TorchScript": ("w.pt", script, "is a TorchScript archive, whose code gradindex never executes"),
    "a tar": ("w.tar", tar, "is an archive"),
    "HDF5": ("w.pt", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99), "is an HDF5 file"),
    "an array": ("w.pt", lambda path: path.write_bytes(b"\x93NUMPY\1\0" + b"\0" * 99), "does not start like a file"),
    "a pickle": ("w.pt", lambda p: p.write_bytes(pickle.dumps(WEIGHTS)), "a pickle that torch.save did not write"),
    "an evil pickle": ("w.pt", lambda p: p.write_bytes(pickle.dumps(Evil())), "gradindex never executes one"),
    "an evil old file": ("w.pt", legacy(Evil()), r"Python objects besides tensors .*(posix|nt)\.system.* never exec"),
    "a damaged old file": ("w.pt", legacy(WEIGHTS, flipped), "cannot be read as a checkpoint|never executes"),
    "half an old file": ("w.pt", legacy(WEIGHTS, lambda raw: raw[: len(raw) // 2]), "truncated or damaged"),
    "an optimizer": (
        "w.pt",
        lambda p: torch.save(torch.optim.Adam(toys.mlp().parameters()).state_dict(), p),
        "state of an optimizer",
    ),
    "a lying header": ("w.safetensors", forged({"w": entry(shape=(40,))}), "the offsets of w do not fit its shape"),
    "huge claims": ("w.safetensors", forged({"w": entry(shape=(2**62, 4), offsets=(0, 2**66))}), "has 16"),
    "negative": ("w.safetensors", forged({"w": entry(shape=(-4,), offsets=(0, -16))}), "offsets of w are invalid"),
    "overlaps": ("w.safetensors", forged({"v": entry(), "w": entry()}), "do not fit its shape"),
    "no such type": ("w.safetensors", forged({"w": entry(dtype="F4")}), "has the unknown type F4"),
    "no header": ("w.safetensors", lambda p: p.write_bytes(b"\xff" * 64), "header is longer than the file"),
    "deep JSON": ("w.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 9**5) + b"[" * 9**5), "damaged"),
    "a list": ("w.safetensors", forged([1, 2]), "damaged"),
    "a shard": ("model-00001-of-00003.safetensors", forged({"w": entry()}), "is part 1 of 3 of a checkpoint"),
    "an old shard": ("pytorch_model-00002-of-00002.bin", legacy(WEIGHTS), "is part 2 of 2 .* torch.save"),
    "an adapter": (
        "adapter_model.bin",
        legacy({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}),
        r"holds only an adapter \(1 tensors\), but all weights of the model are needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, monkeypatch, case):
    name, write, message = NO_CHECKPOINTS[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as raised:
        gradindex.Checkpoint(tmp_path / name, 0.1).load(toys.mlp())
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))
    assert not (tmp_path / "executed").exists()
    if "pickle" in case or "evil" in case:
        assert "truncated" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_random_damage_is_an_error_of_one_line_or_no_change(tmp_path, model, kind):
    path = tmp_path / ("w_1.safetensors" if kind == "safetensors" else "w_1.pt")
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(150):
        raw = bytearray(whole)
        for at in random.integers(len(raw), size=random.integers(1, 4)):
            raw[at] = random.integers(256)
        path.write_bytes(raw[: random.integers(1, len(raw))] if random.random() < 0.2 else raw)
        try:
            gradindex.Checkpoint(path, 0.1).load(toys.mlp())
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in line for line in refused)


def test_legacy_files_are_read(tmp_path, model):
    legacy(model.state_dict())(tmp_path / "w_1.pth")
    assert same(gradindex.Checkpoint(tmp_path / "w_1.pth", 0.1).load(toys.mlp()), model)


@pytest.mark.parametrize("name", ["w_1.bin", "w_1.pt"])
def test_a_file_is_read_by_what_it_is_and_not_by_its_suffix(tmp_path, model, name):
    save_file(model.state_dict(), tmp_path / name)
    assert same(gradindex.Checkpoint(tmp_path / name, 0.1).load(toys.mlp()), model)


def test_every_type_of_safetensors_is_read_as_its_own_library_reads_it(tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
    floats += (torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in floats}
    tensors |= {str(dtype): torch.arange(6).to(dtype) for dtype in (torch.uint8, torch.int16, torch.int64, torch.bool)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"step": "7"})
    found, expected = gradindex.weights.read(tmp_path / "w.safetensors"), load_file(tmp_path / "w.safetensors")
    assert found.value.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.value[name].dtype == tensor.dtype
        assert found.value[name].shape == tensor.shape
        assert torch.equal(found.value[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert gradindex.find_checkpoints(tmp_path, learning_rate=1)[0].step == 7


def test_types_that_a_person_allows_are_read_and_others_are_named(tmp_path, model):
    settings = types.SimpleNamespace(lr=0.1)  # other libraries allow argparse.Namespace where they are imported
    found = saved(tmp_path, {"state_dict": model.state_dict(), "hyper_parameters": settings})
    with pytest.raises(CheckpointError, match=r"\(types\.SimpleNamespace\).*add_safe_globals\(\[types\.SimpleName"):
        found.load(toys.mlp())
    with torch.serialization.safe_globals([types.SimpleNamespace]):
        assert same(found.load(toys.mlp()), model)
    scalar = saved(tmp_path, {"state_dict": model.state_dict(), "best": np.float64(0.5)}, "w_4.pt")
    with pytest.raises(CheckpointError, match=r"multiarray\.scalar.*add_safe_globals"):
        scalar.load(toys.mlp())


def test_code_is_not_offered_to_be_allowed(tmp_path):
    with pytest.raises(CheckpointError, match="never executes") as raised:
        saved(tmp_path, Evil()).load(toys.mlp())
    assert "add_safe_globals" not in str(raised.value)


def test_a_pickle_protocol_with_other_instructions_is_not_called_truncated(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "w_1.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="its own pickle protocol") as raised:
        gradindex.Checkpoint(tmp_path / "w_1.pt", 0.1).load(model)
    assert "truncated" not in str(raised.value)


def changed(make):
    def content():
        torch.manual_seed(0)
        state = dict(toys.mlp().state_dict())
        state["2.weight"] = make(state["2.weight"])
        return state

    return content


def with_one(value):
    def make(weight):
        weight = weight.clone()
        weight[1, 2] = value
        return weight

    return make


BAD_WEIGHTS = {
    "NaN": (changed(with_one(float("nan"))), r"has 1 NaN or infinite numbers in 2\.weight, so it has no gradients"),
    "infinity": (changed(with_one(-float("inf"))), r"has 1 NaN or infinite numbers in 2\.weight"),
    "NaN in float16": (changed(lambda w: with_one(float("nan"))(w).half()), r"1 NaN .* 2\.weight"),
    "NaN in float8": (changed(lambda w: with_one(float("nan"))(w).to(torch.float8_e5m2)), r"1 NaN .* 2\.weight"),
    "integers": (changed(lambda w: w.to(torch.int32)), r"has int32 numbers in 2\.weight, but the model has float32"),
    "truth values": (changed(lambda w: w > 0), r"has bool numbers in 2\.weight"),
    "sparse": (changed(lambda w: w.to_sparse()), r"has the layout sparse_coo in 2\.weight.* Save tensor\.to_dense"),
    "compressed": (changed(lambda w: w.to_sparse_csr()), r"has the layout sparse_csr in 2\.weight"),
    "quantised": (
        changed(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        r"has quantised numbers in 2\.weight",
    ),
    "complex": (changed(lambda w: w.to(torch.complex64)), r"has complex64 in 2\.weight, but the model has float32"),
    "meta": (changed(lambda w: w.to("meta")), r"has no data in 2\.weight, which was saved on the meta device"),
    "no elements": (changed(lambda w: w[:0]), r"2\.weight has shape \(0, 5\), the model \(3, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WEIGHTS)
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR", "ignore:TypedStorage is deprecated", "ignore:torch.quantize_per_tensor"
)
def test_weights_that_cannot_be_are_named(tmp_path, case):
    make, message = BAD_WEIGHTS[case]
    found = saved(tmp_path, make())
    with pytest.raises(CheckpointError, match=message) as raised:
        found.load(toys.mlp())
    assert "\n" not in str(raised.value)


def test_large_finite_weights_and_masks_with_infinities_are_no_fault(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("mask", torch.full((3, 3), -float("inf")).triu(1))
            self.frozen = nn.Parameter(torch.full((2,), -float("inf")), requires_grad=False)

    model = Masked()
    with torch.no_grad():
        model.layer.weight.fill_(3e38)  # a sum that overflows
    found = saved(tmp_path, model.state_dict()).load(Masked())
    assert torch.equal(found["layer.weight"], model.layer.weight)
    assert torch.equal(found["mask"], model.mask)


def test_half_precision_weights_give_the_rows_of_their_numbers(tmp_path, model):
    found = saved(tmp_path, {name: tensor.half() for name, tensor in model.state_dict().items()}).load(toys.mlp())
    assert all(torch.equal(found[name].float(), tensor.half().float()) for name, tensor in model.state_dict().items())


def test_weights_keep_no_more_memory_than_they_need(tmp_path, model):
    large = torch.randn(1000, 6)
    state = {**model.state_dict(), "0.weight": large[:5]}  # torch saves all of a view's storage
    found = saved(tmp_path, state).load(toys.mlp())
    assert torch.equal(found["0.weight"], large[:5])
    assert sum(tensor.untyped_storage().nbytes() for tensor in found.values()) == sum(t.nbytes for t in found.values())


def test_no_name_of_a_file_is_a_hang_or_a_traceback(tmp_path, model):
    for path in ("a\0b.pt", tmp_path / ("x" * 300), tmp_path / "w.pt" / "below", "/dev/zero", "/dev/null"):
        with pytest.raises(CheckpointError):
            gradindex.Checkpoint(path, 0.1).load(model)


def test_the_pickles_here_are_what_they_say():
    """The evil pickle would run a command, so that its refusal means something."""
    assert "system" in [arg for _, arg, _ in pickletools.genops(pickle.dumps(Evil())) if isinstance(arg, str)]
