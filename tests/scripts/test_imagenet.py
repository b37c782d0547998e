"""ImageNet's scripts, end to end on made image folders: 1,000 classes, odd and broken pictures, kills, parts."""

import csv
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from places import TOP
from torch.nn import functional

import gradindex
from gradindex import cli
from gradindex.errors import ArgumentError, GradIndexError, MismatchError, StoreError, TaskError

SCRIPTS = TOP / "scripts" / "imagenet"
sys.path.insert(0, str(SCRIPTS))
made, pictures, resnet = (importlib.import_module(name) for name in ("made", "pictures", "resnet"))
build, query, self_influence, task_of = (
    importlib.import_module(n) for n in ("build", "query", "self_influence", "imagenet_task")
)
sys.path.remove(str(SCRIPTS))

CLASSES, SEEN = 1000, 300
SMALL = ["--resize", "40", "--crop", "32"]
ROWS = ["--dim", "64", "--batch-size", "32", "--shard-rows", "64", "--workers", "2"]
TRUNCATED, EMPTY, TEXT = 0, 70, 280  # ids
GREY, CMYK, PALETTE, ALPHA = 100, 101, 102, 103


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One picture in each of 300 classes, no picture in 700; some pictures are odd and three are broken."""
    root = made.make_folder(tmp_path_factory.mktemp("data") / "imagenet", [1] * SEEN + [0] * (CLASSES - SEEN), val=4)
    picture = made.picture(1)
    picture.convert("L").save(path_of(root, GREY))
    picture.convert("CMYK").save(path_of(root, CMYK))
    picture.quantize(8).save(path_of(root, PALETTE), format="PNG", transparency=b"\0\x40\x80")
    Image.merge("RGBA", (*picture.split(), Image.new("L", picture.size, 9))).save(path_of(root, ALPHA), format="PNG")
    path_of(root, TRUNCATED).write_bytes(path_of(root, TRUNCATED).read_bytes()[:600])
    path_of(root, EMPTY).write_bytes(b"")
    path_of(root, TEXT).write_text("no picture")
    return root


@pytest.fixture(scope="module")
def options(folder, tmp_path_factory):
    checkpoints = made.make_checkpoints(tmp_path_factory.mktemp("checkpoints"), CLASSES, width=4)
    return ["--data", str(folder), *SMALL, *checkpoints]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "store"
    build.main([*options, *ROWS, "--out", str(out), "--broken", "skip"])
    return gradindex.GradientStore(out)


@pytest.fixture
def few(tmp_path):
    """Options for twelve pictures in three classes, all of them sound."""
    options = made.quick_options(tmp_path)
    cut = tmp_path / "imagenet" / "train" / made.synset(1) / f"{made.synset(1)}_2.JPEG"
    made.picture(99).save(cut)
    return options


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*arguments)``: the exit code of ``python scripts/imagenet/build.py ...`` and what it wrote to stderr."""

    def as_main(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "build.py"), *map(str, arguments)])
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.syspath_prepend(SCRIPTS)
            runpy.run_path(sys.argv[0], run_name="__main__")
        code, said = ended.value.code, capsys.readouterr().err
        return (1, f"{said}{code}\n") if isinstance(code, str) else (code, said)  # as the interpreter ends

    return as_main


def path_of(root, label, number=0, split="train"):
    return root / split / made.synset(label) / f"{made.synset(label)}_{number}.JPEG"


def shards(store):
    return {path.name: path.read_bytes() for path in (store / "shards").iterdir()}


@pytest.mark.slow
def test_a_thousand_classes_with_odd_and_broken_pictures(whole, folder):
    assert whole.ids.tolist() == [i for i in range(SEEN) if i not in (TRUNCATED, EMPTY, TEXT)]
    assert whole.verify() == []
    assert whole.dim == 3 * 64
    assert whole.column("path", np.array([CMYK]))[0] == f"train/{made.synset(CMYK)}/{made.synset(CMYK)}_0.JPEG"
    assert whole.column("name", np.array([SEEN - 1]))[0] == f"thing {SEEN - 1}"
    record = whole.folder.with_name("store.checked.jsonl")
    found = {name for line in record.read_text().splitlines() for name in json.loads(line)["broken"]}
    assert found == {str(path_of(folder, i).relative_to(folder)) for i in (TRUNCATED, EMPTY, TEXT)}


@pytest.mark.slow
@pytest.mark.parametrize("label", [GREY, CMYK, PALETTE, ALPHA, 7])
def test_a_row_is_that_of_the_picture_in_rgb_through_the_last_layer(whole, folder, options, label):
    parsed = task_of.parser(None)
    task_of.task_options(parsed)
    task = task_of.make_task(parsed.parse_args(options))
    pixels = np.asarray(Image.open(path_of(folder, label)).convert("RGBA").convert("RGB").resize((56, 40), 2))
    image = torch.from_numpy(pixels[4:36, 12:44].copy()).permute(2, 0, 1)[None].float() / 255
    image = (image - torch.tensor(task_of.MEAN).view(3, 1, 1)) / torch.tensor(task_of.STD).view(3, 1, 1)
    expected = []
    for checkpoint in task.checkpoints:
        model = resnet.resnet14(CLASSES, 4)
        model.load_state_dict(checkpoint.load(model))
        loss = functional.cross_entropy(model.eval()(image), torch.tensor([label]))
        gradients = torch.autograd.grad(loss, (model.fc.weight, model.fc.bias))
        expected.append(checkpoint.learning_rate * sum(g.square().sum().item() for g in gradients))
    np.testing.assert_allclose(whole.self_influence(np.array([label]))[0], expected, rtol=1e-3)


@pytest.mark.slow
def test_a_broken_picture_stops_a_build_by_name_and_what_is_sound_stays(options, folder, tmp_path, run):
    for workers in ("0", "2"):
        rows = [*ROWS[:-1], workers]
        with pytest.raises(pictures.BrokenPictureError) as caught:
            build.main([*options, *rows, "--out", str(tmp_path / "store")])
        said = str(caught.value)
        assert re.fullmatch(rf"{path_of(folder, TRUNCATED)} cannot be decoded: [^\n]*[Tt]runcated[^\n]*", said)
    code, said = run(*options, "--out", tmp_path / "store")
    assert code == 1
    assert re.fullmatch(rf"Error: {path_of(folder, TRUNCATED)} cannot be decoded: .*\n", said)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_picture_that_breaks_on_the_way_stops_the_build_and_nothing_wrong_is_stored(few, tmp_path):
    rows = ["--dim", "9", "--batch-size", "2", "--shard-rows", "2", "--workers", "1", "--out", str(tmp_path / "store")]
    last = path_of(tmp_path / "imagenet", 2, 1)  # id 9, which no check before the build looks at
    sound = last.read_bytes()
    last.write_bytes(sound[:500])
    with pytest.raises(pictures.BrokenPictureError, match=f"{last} cannot be decoded"):
        build.main([*few, *rows])
    last.write_bytes(sound)
    build.main([*few, *rows])
    build.main([*few, *rows[:-1], str(tmp_path / "other")])
    assert shards(tmp_path / "store") == shards(tmp_path / "other")


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_and_ends_as_if_nothing_had_happened(whole, options, tmp_path, capsys):
    arguments = [*options, *ROWS, "--out", str(tmp_path / "store"), "--broken", "skip"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, SCRIPTS / "build.py", *arguments], env=environment)
    deadline = time.monotonic() + 600  # on a busy machine
    while len(list(tmp_path.glob("store/shards/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "store" / "manifest.json").exists()
    build.main(arguments)
    said = capsys.readouterr()
    assert re.search(r"resuming, [1-9]\d* of 297 rows are done", said.err)
    assert "rows    297 of 192 numbers, " in said.out
    assert shards(tmp_path / "store") == shards(whole.folder)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == (whole.folder / "manifest.json").read_bytes()


@pytest.mark.slow
def test_parts_and_a_seal_are_one_build(whole, options, tmp_path, capsys):
    arguments = [*options, *ROWS, "--out", str(tmp_path / "store"), "--broken", "skip"]
    with pytest.raises(GradIndexError, match=r"store.checked.jsonl does not say yet .* with --check in their place"):
        build.main([*arguments, "--part", "1/2"])
    build.main([*arguments, "--check"])
    assert f"{path_of(Path(options[1]), TEXT)} cannot be decoded: cannot identify" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    for part in ("2/2", "1/2"):
        build.main([*arguments, "--part", part])
    sealed = CliRunner().invoke(cli.main, ["seal", str(tmp_path / "store")])
    assert sealed.exit_code == 0, sealed.output
    assert shards(tmp_path / "store") == shards(whole.folder)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == (whole.folder / "manifest.json").read_bytes()


@pytest.mark.slow
def test_a_dry_run_tells_and_stops(few, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "store"), "--factors", "float16"]
    build.main([*few, *out, "--dry-run"])
    said = capsys.readouterr().out
    assert "rows    12 of 4,416 numbers\n" in said  # 1,472 at each of three checkpoints
    assert "1.56 kB of it exact factors" in said  # 2 bytes x 3 checkpoints x (256 + 1 + 3)
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="still needs about .* GB, but its disk has 1e-06 GB free"):
        build.main([*few, *out])


@pytest.mark.slow
def test_asking_about_pictures_of_val_and_about_files(whole, options, folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    query.main([str(whole.folder), *options, "--position", "2", "-k", "3", "--html", str(page)])
    said = capsys.readouterr().out
    name = made.synset(2)
    assert f"query 2 (synset {name}, name thing 2, path val/{name}/{name}_0.JPEG): proponents\n" in said
    (first, *_) = re.findall(r"^   1 .*$", said, re.MULTILINE)
    assert re.search(r" n\d{8}  thing \d+ +train/n\d{8}/n\d{8}_0.JPEG$", first)
    assert page.read_text().count('<img src="data:image/png') == 1 + 3 + 3
    mine = path_of(folder, CMYK)
    query.main([str(whole.folder), *options, "--file", str(mine), "--class", made.synset(CMYK), "-k", "297"])
    said = capsys.readouterr().out
    assert f"{mine} (class {made.synset(CMYK)}): opponents" in said
    (with_itself, *_) = re.findall(rf"^ *\d+ +{CMYK} +(\S+) ", said, re.MULTILINE)
    assert float(with_itself) == pytest.approx(whole.self_influence(np.array([CMYK])).sum(), rel=1e-3)


@pytest.mark.slow
def test_a_file_without_a_class_is_asked_about_as_the_last_checkpoint_sees_it(few, tmp_path, capsys):
    build.main([*few, "--out", str(tmp_path / "store"), "--dim", "50"])
    model = resnet.resnet14(3, made.WIDTH)
    model.load_state_dict(torch.load(tmp_path / "checkpoints" / "epoch_90.pt"))
    picture = path_of(tmp_path / "imagenet", 1, split="val")
    pixels = torch.from_numpy(pictures.Preparation(40, 32)(picture))[None]
    seen = int(model.eval()(task_of.normalised(pixels, model)).argmax())
    query.main([str(tmp_path / "store"), *few, "--file", str(picture), "-k", "1", "--kind", "opponents"])
    said = capsys.readouterr().out
    assert f"{picture} (predicted {made.synset(seen)}): opponents" in said
    assert "proponents" not in said.partition("exact TracInCP")[0]
    with pytest.raises(ArgumentError, match="--class is 'n9', for which train has no folder"):
        query.main([str(tmp_path / "store"), *few, "--file", str(picture), "--class", "n9"])
    with pytest.raises(SystemExit) as caught:
        query.main([str(tmp_path / "store"), *few, "--position", "0", "--class", made.synset(0)])
    assert caught.value.code == 2
    with pytest.raises(MismatchError, match="checkpoints differ"):
        query.main([str(tmp_path / "store"), *few[:-2], "--checkpoint", few[-3], "--position", "0"])


@pytest.mark.slow
def test_all_pictures_ranked_by_self_influence(whole, folder, tmp_path, capsys):
    table, page = tmp_path / "all.csv", tmp_path / "page.html"
    places = ["--data", str(folder), *SMALL, "--csv", str(table), "--html", str(page)]
    self_influence.main([str(whole.folder), *places, "-k", "4"])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    scores = whole.self_influence().sum(1)
    assert [int(row["id"]) for row in rows] == whole.ids[np.argsort(-scores, kind="stable")].tolist()
    assert [int(row["rank"]) for row in rows] == list(range(1, len(whole.ids) + 1))
    assert rows[0]["path"] == whole.column("path", np.array([int(rows[0]["id"])]))[0]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1
    assert page.read_text().count('<img src="data:image/png') == 4
    self_influence.main([str(whole.folder), *places, "-k", "4"])  # its own are replaced
    table.write_text("somebody's own")
    with pytest.raises(StoreError, match="was not written by gradindex for this"):
        self_influence.main([str(whole.folder), *places, "-k", "4"])
    assert table.read_text() == "somebody's own"


@pytest.mark.slow
def test_the_check_goes_on_where_it_was_and_sees_what_was_replaced(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "data")
    files = pictures.list_files(tmp_path / "data", "train", pictures.find_classes(tmp_path / "data"))
    record, looked = tmp_path / "record.jsonl", []
    plain = pictures.decoded
    monkeypatch.setattr(pictures, "decoded", lambda path, **o: looked.append(path) or plain(path, **o))
    assert pictures.recorded_broken(files, record) is None
    found = pictures.find_broken(files, record, 0)
    assert sorted(found) == [TRUNCATED, EMPTY, TEXT]
    assert len(looked) == SEEN
    assert pictures.recorded_broken(files, record) == found
    first, second = record.read_text().splitlines()
    record.write_text(first + "\n" + second[:40])  # killed while it wrote
    assert pictures.recorded_broken(files, record) is None
    assert pictures.find_broken(files, record, 2) == found
    assert len(record.read_text().splitlines()) == 3
    for i in (TRUNCATED, EMPTY):
        made.picture(i).save(path_of(tmp_path / "data", i))
    assert sorted(pictures.find_broken(files, record, 0)) == [TEXT]
    looked.clear()
    assert sorted(pictures.find_broken(files, record, 0)) == [TEXT]
    assert len(looked) == SEEN - 256  # the first 256 are known to be sound
    path_of(tmp_path / "data", 3).rename(path_of(tmp_path / "data", 3, 7))
    files = pictures.list_files(tmp_path / "data", "train", pictures.find_classes(tmp_path / "data"))
    assert pictures.recorded_broken(files, record) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_the_system_cannot_read_is_not_called_broken(few, tmp_path, workers):
    files = pictures.list_files(tmp_path / "imagenet", "train", pictures.find_classes(tmp_path / "imagenet"))
    gone = path_of(tmp_path / "imagenet", 1)
    gone.unlink()
    with pytest.raises(pictures.PictureError, match=f"{gone} cannot be read: No such file"):
        pictures.find_broken(files, tmp_path / "record", workers)
    assert pictures.recorded_broken(files, tmp_path / "record") is None


def test_preparing_is_what_training_saw(tmp_path):
    y, x = np.mgrid[0:300, 0:400]
    smooth = np.stack([x / 400, y / 300, (x + y) / 700], 2) * 255
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "wide.png")
    got = pictures.Preparation()(tmp_path / "wide.png")
    assert (got.shape, got.dtype) == ((3, 224, 224), np.uint8)
    tensor = torch.from_numpy(smooth.astype(np.uint8)).permute(2, 0, 1)[None].float()
    wanted = functional.interpolate(tensor, (256, 341), mode="bilinear", antialias=True)[0, :, 16:240, 58:282]
    assert (torch.from_numpy(got).float() - wanted).abs().max() <= 1
    assert pictures.Preparation()(tmp_path / "wide.png").flags.c_contiguous
    Image.fromarray(smooth.astype(np.uint8).transpose(1, 0, 2)).save(tmp_path / "tall.png")
    np.testing.assert_allclose(pictures.Preparation()(tmp_path / "tall.png"), got.transpose(0, 2, 1), atol=1)


def test_a_turned_picture_is_read_as_it_is_stored_unless_asked_for_upright(tmp_path):
    picture = made.picture(3, (60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert pictures.decoded(tmp_path / "turned.png").size == (60, 30)
    upright = pictures.decoded(tmp_path / "turned.png", upright=True)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(picture), -1))


def test_pixels_that_do_not_fit_eight_bits_are_refused(tmp_path):
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(pictures.BrokenPictureError, match="has pixels of type I;16, but must be"):
        pictures.decoded(tmp_path / "deep.png")


def test_a_flat_val_folder_takes_its_classes_from_a_file(few, tmp_path):
    root = tmp_path / "imagenet"
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    for number, label in enumerate((2, 0)):
        made.picture(number).save(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
        with (root / "labels.csv").open("a") as file:
            file.write(f"ILSVRC2012_val_{number:08d},{made.synset(label)} 85 1 499 272\n")
    classes = pictures.find_classes(root)
    files = pictures.list_files(root, "val", classes, root / "labels.csv")
    assert files.labels.tolist() == [2, 0]
    assert files.name(1) == "val/ILSVRC2012_val_00000001.JPEG"
    with pytest.raises(pictures.PictureError, match=r"classes are unknown. Give their labels"):
        pictures.list_files(root, "val", classes)
    (root / "numbers.txt").write_text("490\n361\n")
    with pytest.raises(pictures.PictureError, match="they are not in the order of synsets"):
        pictures.list_files(root, "val", classes, root / "numbers.txt")
    (root / "labels.csv").write_text(f"ILSVRC2012_val_00000000 {made.synset(7)}\n")
    with pytest.raises(pictures.PictureError, match="has the class n00000007, for which train has no folder"):
        pictures.list_files(root, "val", classes, root / "labels.csv")


def test_names_come_from_any_text_file_of_synsets(tmp_path):
    (tmp_path / "names.txt").write_text("n1\ttench, Tinca\nn2 great  white shark\n\nn9 nothing\n")
    assert pictures.read_names(tmp_path / "names.txt", ["n1", "n2", "n3"]) == ["tench", "great white shark", "n3"]
    with pytest.raises(pictures.PictureError, match="names none of the 1 classes"):
        pictures.read_names(tmp_path / "names.txt", ["n4"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["--model-option", "deep=1"], TaskError, "resnet:resnet14 cannot be called so: .*'deep'"),
        (["--model-option", "deep"], ArgumentError, "must look like num_classes=1000"),
        (["--model", "resnet:resnet51"], TaskError, "resnet has no 'resnet51'. Close names: resnet50"),
        (["--model", "os:getcwd", "--model-option", "x=1"], TaskError, "os:getcwd cannot be called so"),
        (["--model", "resnet50"], TaskError, "'resnet50' does not name a function that makes a network"),
        (["--layers", "head"], TaskError, "head"),
        (["--crop", "41"], ArgumentError, "--crop is 41, but must be from 1 to --resize, 40"),
        (["--checkpoints", "x"], ArgumentError, "either --checkpoint PATH=RATE for each, or --checkpoints DIR"),
        (["--checkpoint", "nowhere=3.pt"], GradIndexError, "nowhere=3.pt does not exist"),
        (["--data", "nowhere"], pictures.PictureError, "nowhere/train cannot be read: No such file"),
        (["--val-labels", "nowhere"], pictures.PictureError, "nowhere cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_one_sentence(few, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        build.main([*few, "--out", str(tmp_path / "store"), *change])
    assert not (tmp_path / "store").exists()


def test_a_network_of_another_number_of_classes_is_refused(few, tmp_path):
    (tmp_path / "imagenet" / "train" / made.synset(9)).mkdir()
    with pytest.raises(TaskError, match=r"gives scores of shape \(1, 3\), but train has 4 folders"):
        build.main([*few, "--out", str(tmp_path / "store")])


def test_checkpoints_with_recorded_rates_and_a_factory_of_ones_own(few, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef tiny(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("own").tiny(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.25)
    recorder = gradindex.Recorder(model, optimizer, tmp_path / "recorded")
    optimizer.step()
    recorder.save()
    own = ["--model", "own:tiny", "--model-option", "classes=3", "--layers", "2", "--layers", "0"]
    arguments = [*few[:6], *own, "--checkpoints", str(tmp_path / "recorded"), "--out", str(tmp_path / "store")]
    build.main([*arguments, "--projection", "kronecker", "--dim", "40", "--row-type", "int8"])
    store = gradindex.GradientStore(tmp_path / "store")
    (checkpoint,) = store.manifest.map.checkpoints
    assert checkpoint.weighting == "learning_rate"
    assert set(checkpoint.learning_rates.values()) == {0.25}
    assert [layer.name for layer in store.manifest.map.layers] == ["0", "2"]
    assert store.manifest.row_type == "int8"


@pytest.mark.slow
def test_the_network_is_torchvisions_by_its_names_and_sizes():
    state = resnet.resnet50().state_dict()
    assert len(state) == 320
    assert sum(p.numel() for p in resnet.resnet50().parameters()) == 25_557_032
    sizes = {
        "conv1.weight": (64, 3, 7, 7),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.num_batches_tracked": (),
        "layer4.2.bn3.running_var": (2048,),
        "fc.weight": (1000, 2048),
    }
    assert {name: tuple(state[name].shape) for name in sizes} == sizes
    assert [n for n in state if n.startswith("layer2.1.")][0:2] == ["layer2.1.conv1.weight", "layer2.1.bn1.weight"]
    assert "layer1.1.downsample.0.weight" not in state


@pytest.mark.slow
def test_the_factors_of_the_real_network_at_224_pixels_are_packed(tmp_path, capsys):
    root = made.make_folder(tmp_path / "data", [1, 1] + [0] * 998, val=0)
    options = ["--data", str(root), *made.make_checkpoints(tmp_path, 1000, [0.1], 64, resnet.resnet50)]
    build.main(
        [*options, "--out", str(tmp_path / "store"), "--factors", "float16", "--workers", "0", "--batch-size", "2"]
    )
    store = gradindex.GradientStore(tmp_path / "store")
    packed = sum(way.row_bytes(size) for way, size in zip(store.manifest.packing[0], (2049, 1000), strict=True))
    assert f"{packed / 1e3:.3g} kB of it exact factors" in capsys.readouterr().out
    assert packed < 0.8 * 2 * (2049 + 1000)  # what they take whole, at one checkpoint
    x, delta = store.factors(np.array([1]))[0, 0]
    assert (x.shape, delta.shape, store.dim) == ((1, 2049), (1, 1000), 1472)
    norms = np.square(x.astype(np.float64)).sum() * np.square(delta.astype(np.float64)).sum()
    np.testing.assert_allclose(norms, store.self_influence(np.array([1]))[0, 0], rtol=1e-2)


LAST = {"build": "from 3 checkpoints", "query": "stages: rows 11, model 11", "self_influence": "ambiguous pictures"}


@pytest.mark.parametrize("script", LAST)
def test_quick_runs_end_to_end(script, quick_forms):
    said = (quick_forms[1] / "imagenet" / f"{script}.log").read_text()
    assert "11 rows of 12 pictures, 4,416 numbers each, from 3 checkpoints" in said
    assert "n00000001_2.JPEG cannot be decoded: image file is truncated" in said
    assert f"{LAST[script]}\n" in said


def test_quick_goes_alone(run):
    assert run("--quick", "--out", "x") == (2, "Error: --quick goes alone, without other options.\n")


def test_the_benchmark_measures_and_projects(quick_forms):
    folder = quick_forms[1] / "bench"
    result = json.loads((folder / "imagenet.log").read_text().splitlines()[-1])
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert [bar["name"] for bar in result["bars"]] == ["rows / forward"]
    hours = next(value for name, value in figures.items() if name.startswith("projected for this machine"))
    assert hours == pytest.approx(1_281_167 * 3 / figures["rows of one checkpoint"] / 3600)
    assert "estimated, not measured: one H100 at 40%" in (folder / "imagenet.md").read_text()


@pytest.mark.slow
def test_the_commands_of_the_page_run(few, tmp_path, monkeypatch, capsys):
    """Those of docs/imagenet.md, on twelve pictures instead of 1.28 million, and a network less deep."""
    monkeypatch.chdir(tmp_path)
    page = (TOP / "docs" / "imagenet.md").read_text()
    lines = re.sub(r" \\\n *", " ", page).splitlines()
    commands = [line.strip() for line in lines if re.match(r" {4,}(python scripts/imagenet|gradindex) ?", line)]
    settings = [line.strip() for line in lines if line.startswith("    --")]
    assert len(settings) == 5
    assert len(commands) >= 8
    for number in (30, 60, 90):
        shutil.copy(tmp_path / "checkpoints" / f"epoch_{number}.pt", tmp_path)
    text = "\n".join([*settings, *SMALL, "--model-option num_classes=3", f"--model-option width={made.WIDTH}"])
    (tmp_path / "imagenet.args").write_text(
        text.replace("/data/imagenet", str(tmp_path / "imagenet")).replace("resnet50", "resnet14")
    )
    made.picture(5).save(tmp_path / "photo.jpg")
    scripts = {f"scripts/imagenet/{script.__name__}.py": script for script in (build, query, self_influence)}
    for command in commands:
        words = (
            re.sub("--device cuda|--workers [0-9]+", "", command)
            .replace("--position 17", "--position 1")
            .replace("/data/", f"{tmp_path}/")
        )
        for turn in range(1, 5) if "$SLURM_ARRAY_TASK_ID" in words else [0]:
            program, *rest = shlex.split(words.replace("$SLURM_ARRAY_TASK_ID", str(turn)))
            if program == "gradindex":
                done = CliRunner().invoke(cli.main, rest)
                assert done.exit_code == 0, f"{command}: {done.output}"
            else:
                scripts[rest[0]].main(rest[1:])
    assert (tmp_path / "page.html").exists()
