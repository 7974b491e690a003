"""The reader of pickled weights: strides, damaged files, and files that want to run something."""

import array
import contextlib
import importlib.util
import io
import json
import pickle
import struct
import sys
import tempfile
import types
import unittest
from collections import OrderedDict
from pathlib import Path
from unittest import mock

FOLDER = Path(__file__).resolve().parent.parent


def by_path(name, file):
    spec = importlib.util.spec_from_file_location(name, FOLDER / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


artaug_fetch = by_path("artaug_fetch_of_weights", "fetch.py")
weights = artaug_fetch.weights


class Storage:
    """Numbers that a file refers to by key."""

    def __init__(self, key, letter, values):
        self.key, self.letter, self.values = key, letter, values


class Described:
    """Pickles as a call of the rebuilding function, as PyTorch's tensors do."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


def legacy(state, storages, keys=None, counts=None):
    """A file in PyTorch's old format."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        pass

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2, torch._utils = _rebuild_tensor_v2, utils

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            kind = torch.FloatStorage if value.letter == "f" else torch.LongStorage
            return ("storage", kind, value.key, "cpu", len(value.values), None)

    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        out = io.BytesIO()
        for part in (weights.MAGIC, weights.PROTOCOL, {"little_endian": True, "type_sizes": {}}):
            pickle.dump(part, out, 2)
        Pickler(out, 2).dump(state)
        pickle.dump([storage.key for storage in storages] if keys is None else keys, out, 2)
    for place, storage in enumerate(storages):
        count = len(storage.values) if counts is None else counts[place]
        out.write(struct.pack("<q", count) + array.array(storage.letter, storage.values).tobytes())
    return out.getvalue()


class Pins(unittest.TestCase):
    def test_every_converted_file_and_its_source_is_pinned(self):
        for made in artaug_fetch.CONVERTED:
            pins = [made.sha256, *made.source.files.values(), *(package.sha256 for package in made.source.packages)]
            for pin in pins:
                self.assertRegex(pin, "^[0-9a-f]{64}$")
            self.assertIn("LICENSE", made.source.files)


class Reading(unittest.TestCase):
    def test_strides_are_applied(self):
        storage = Storage("1", "f", [0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 99.0])
        state = OrderedDict(
            # Column by column in memory, from the first number on.
            turned=Described(storage, 0, (2, 3), (1, 2)),
            # As convolutions of one pixel are written: the strides of axes of length 1 lead nowhere.
            single=Described(storage, 1, (3, 1, 1), (2, 500, 500)),
            last=Described(storage, 6, (), ()),
            repeated=Described(storage, 6, (3,), (0,)),
        )
        read = weights.read_legacy(legacy(state, [storage]))
        self.assertEqual(list(read["turned"].values), [0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
        self.assertEqual(read["turned"].shape, (2, 3))
        self.assertEqual(list(read["single"].values), [10.0, 11.0, 12.0])
        self.assertEqual((read["last"].shape, list(read["last"].values)), ((), [99.0]))
        self.assertEqual(list(read["repeated"].values), [99.0] * 3)

    def test_a_view_beyond_its_storage_is_refused(self):
        storage = Storage("1", "f", [1.0, 2.0, 3.0])
        for offset, shape, strides in ((1, (3,), (1,)), (0, (2, 2), (2, 1)), (-1, (1,), (1,)), (2, (2,), (-1,)), (0, (2,), ())):
            file = legacy({"x": Described(storage, offset, shape, strides)}, [storage])
            with self.subTest(shape=shape, offset=offset), self.assertRaises(weights.WeightsError):
                weights.read_legacy(file)

    def test_nothing_but_plain_tensors_is_called(self):
        class Command:
            def __reduce__(self):
                return print, ("run",)

        out = io.StringIO()
        with contextlib.redirect_stdout(out), self.assertRaises(weights.WeightsError) as refused:
            weights.read_legacy(legacy({"x": Command()}, []))
        self.assertIn("print", str(refused.exception))
        self.assertEqual(out.getvalue(), "")
        with self.assertRaises(weights.WeightsError):
            weights.read_table(pickle.dumps({"x": Command()}))

    def test_files_cut_short_or_of_other_counts_are_refused(self):
        storage = Storage("1", "f", [1.0, 2.0])
        state = {"x": Described(storage, 0, (2,), (1,))}
        whole = legacy(state, [storage])
        self.assertEqual(list(weights.read_legacy(whole)["x"].values), [1.0, 2.0])
        for length in range(len(whole)):
            with self.assertRaises(weights.WeightsError):
                weights.read_legacy(whole[:length])
        for file in (whole + b"x", legacy(state, [storage], keys=["1", "1"]), legacy(state, [storage], keys=[]), legacy(state, [storage], counts=[3])):
            with self.assertRaises(weights.WeightsError):
                weights.read_legacy(file)


class Writing(unittest.TestCase):
    def test_tensors_stand_in_the_order_of_their_names_after_an_aligned_header(self):
        raw = weights.safetensors({"b": weights.numbers([2], [1.0, 2.0]), "a": weights.numbers([1, 1], [3.0])})
        length = struct.unpack("<Q", raw[:8])[0]
        self.assertEqual(length % 8, 0)
        header = json.loads(raw[8 : 8 + length])
        self.assertEqual(header["a"], {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]})
        self.assertEqual(struct.unpack("<3f", raw[8 + length :]), (3.0, 1.0, 2.0))

    def test_the_counters_of_batch_normalisation_are_left_out(self):
        floats, counter = Storage("1", "f", [5.0]), Storage("2", "q", [7])
        state = {"w": Described(floats, 0, (1,), (1,)), "bn.num_batches_tracked": Described(counter, 0, (), ())}
        raw = weights.efficientnet(legacy(state, [floats, counter]))
        self.assertIn(b'"w"', raw)
        self.assertNotIn(b"tracked", raw)

    def test_a_regression_becomes_tensors(self):
        svm = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.05\ntotal_sv 2\nrho -3.5\nSV\n-4 1:0.5 2:1\n4 2:-1\n"
        raw = weights.brisque(svm, pickle.dumps({"min_": [0.0, 1.0], "max_": [2.0, 3.0]}))
        self.assertIn(struct.pack("<4f", 0.5, 1.0, 0.0, -1.0), raw)
        for damaged in (svm.replace("total_sv 2", "total_sv 3"), svm.replace("2:1", "3:1"), svm.replace("rbf", "linear"), svm.replace("gamma", "g")):
            with self.assertRaises(weights.WeightsError):
                weights.brisque(damaged, pickle.dumps({"min_": [0.0, 1.0], "max_": [2.0, 3.0]}))


class Conversion(unittest.TestCase):
    def made(self, sha256):
        first = artaug_fetch.CONVERTED[0]
        return artaug_fetch.Converted(first.source, "out/model", "model.safetensors", sha256, lambda folder: b"converted")

    def run_convert(self, made, cache):
        def fetched(resource, cache, download, say):
            folder = cache / resource.folder
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "LICENSE").write_bytes(licence)
            return folder

        licence = b"text"
        made.source.files["LICENSE"] = artaug_fetch.demo.hashlib.sha256(licence).hexdigest()
        with mock.patch.object(artaug_fetch.demo, "fetch", fetched):
            return artaug_fetch.convert(made, cache, say=lambda line: None)

    def test_a_folder_appears_whole_or_not_at_all(self):
        good = artaug_fetch.demo.hashlib.sha256(b"converted").hexdigest()
        with tempfile.TemporaryDirectory() as name, mock.patch.dict(artaug_fetch.CONVERTED[0].source.files):
            cache = Path(name)
            with self.assertRaises(artaug_fetch.demo.FetchError) as refused:
                self.run_convert(self.made("0" * 64), cache)
            self.assertIn("came out with sha256", str(refused.exception))
            self.assertEqual(list((cache / "out").iterdir()), [])
            folder = self.run_convert(self.made(good), cache)
            self.assertEqual(sorted(path.name for path in folder.iterdir()), ["LICENSE", "model.safetensors"])
            # An altered file is made again.
            (folder / "model.safetensors").write_bytes(b"other")
            self.run_convert(self.made(good), cache)
            self.assertEqual((folder / "model.safetensors").read_bytes(), b"converted")


if __name__ == "__main__":
    unittest.main()
