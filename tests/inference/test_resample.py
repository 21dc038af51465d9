"""Resampling against integrals, SciPy and torch; instances against ellipsoids drawn directly in the stack's voxels."""

import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inference_toys import Perfect, to_instances, tree_digest
from scipy.ndimage import map_coordinates

from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import Instances, at_model_spacing, predict_labels, predict_volume
from seg3d_monai.inference.blocks import roi_shape
from seg3d_monai.inference.journal import Journal
from seg3d_monai.inference.resample import ResamplingPredictor, resample, resampled_roi, restore
from seg3d_monai.inference.seam_check import seam_check

ROI = (3, 10, 7, 21, 33, 52)
SPACING = (2.0, 0.5, 0.4)
STEPS = [(2.5, 1.7, 3.0), (1 / 2.5, 0.6, 1 / 3), (1.3, 1.0, 0.45), (0.9, 2.2, 1.0)]


class Drawing:
    """Ellipsoids in micrometres, drawn at the centres of the voxels of the roi that it gets."""

    def __init__(self, centres, radii, spacing_um):
        self.centres, self.radii = np.atleast_2d(centres), np.atleast_2d(radii)
        self.spacing_um = spacing_um
        self.rois = []

    def labels(self, roi):
        axes = [(np.arange(roi[a], roi[a + 3]) + 0.5) * self.spacing_um[a] for a in range(3)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        labels = np.zeros(grid.shape[1:], np.int32)
        for index, (centre, radius) in enumerate(zip(self.centres, self.radii, strict=True)):
            offset = (grid - centre[:, None, None, None]) / radius[:, None, None, None]
            labels[(offset**2).sum(0) <= 1] = index + 1
        return labels

    def __call__(self, block, roi):
        assert tuple(block.shape[1:]) == roi_shape(roi)
        self.rois.append(roi)
        return to_instances(self.labels(roi))


class DrawingBatches(Drawing):
    def predict_batch(self, blocks, rois):
        return [self(block, roi) for block, roi in zip(blocks, rois, strict=True)]


def noise(shape, channels=2):
    return torch.from_numpy(np.random.default_rng(5).normal(300, 90, (channels, *shape)).astype(np.float32))


def crop(block, roi, origin=(0, 0, 0)):
    return block[(slice(None), *(slice(roi[a] - origin[a], roi[a + 3] - origin[a]) for a in range(3)))]


def along(array, axis, function):
    return np.apply_along_axis(function, axis, array)


def oracle(block, roi, step):
    """Means of the continuous block over coarse voxels, SciPy's interpolation at the centres of fine ones."""
    result, grid = block.numpy().astype(np.float64), resampled_roi(roi, step)
    for axis in range(3):
        start, stop, s = roi[axis], roi[axis + 3], step[axis]
        edges = np.arange(grid[axis], grid[axis + 3] + 1) * s
        if s > 1:
            edges = edges.clip(start, stop)
            faces = np.arange(start, stop + 1)

            def mean(line, edges=edges, faces=faces):
                integral = np.interp(edges, faces, np.concatenate([[0], np.cumsum(line)]))
                return np.diff(integral) / np.diff(edges)

            result = along(result, axis + 1, mean)
        elif s < 1:
            places = edges[:-1] + s / 2 - 0.5 - start
            result = along(result, axis + 1, lambda v, p=places: map_coordinates(v, [p], order=1, mode="nearest"))
    return result


@pytest.mark.parametrize("step", STEPS)
def test_voxels_equal_integrals_and_interpolation(step):
    block = noise(roi_shape(ROI))
    found = resample(block, ROI, step)
    assert found.dtype == torch.float32
    assert tuple(found.shape[1:]) == roi_shape(resampled_roi(ROI, step))
    np.testing.assert_allclose(found.numpy(), oracle(block, ROI, step), atol=1e-3)


def test_whole_ratios_equal_those_of_torch():
    block = noise((6, 12, 20))
    roi = (0, 0, 0, 6, 12, 20)
    torch.testing.assert_close(resample(block, roi, (2.0, 3.0, 4.0)), F.avg_pool3d(block, (2, 3, 4)))
    wanted = F.interpolate(block[None], scale_factor=(2, 3, 4), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resample(block, roi, (1 / 2, 1 / 3, 1 / 4)), wanted)


def test_grid_by_hand():
    assert resampled_roi((0, 2, 3, 4, 6, 9), (2.0, 3.0, 0.5)) == (0, 0, 6, 2, 2, 18)
    assert resampled_roi((0, 7, 299, 1, 8, 300), (3.0, 7.5, 0.1)) == (0, 0, 2990, 1, 2, 3000)  # one voxel is enough


@pytest.mark.parametrize("step", STEPS)
def test_a_place_has_the_same_bits_whichever_block_asks(step):
    whole = (0, 0, 0, 30, 47, 61)
    volume = noise(whole[3:])
    first, second = (0, 5, 11, 24, 40, 54), (7, 0, 17, 30, 47, 61)
    found = [resample(crop(volume, roi), roi, step) for roi in (whole, first, second)]
    grids = [resampled_roi(roi, step) for roi in (whole, first, second)]
    # Voxels of the model whose sources, or neighbours for interpolation, lie in both blocks.
    common = [max(a, b) for a, b in zip(first[:3], second[:3], strict=True)]
    end = [min(a, b) for a, b in zip(first[3:], second[3:], strict=True)]
    low = [int(np.ceil((a + 1) / s)) for a, s in zip(common, step, strict=True)]
    high = [int(np.floor((b - 1) / s)) for b, s in zip(end, step, strict=True)]
    assert all(a < b for a, b in zip(low, high, strict=True))
    parts = [crop(f, (*low, *high), grid[:3]) for f, grid in zip(found, grids, strict=True)]
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[0], parts[2])


def test_stripes_too_fine_for_the_model_become_grey():
    block = torch.zeros(1, 4, 5, 60)
    block[..., ::2] = 100.0
    assert (resample(block, (0, 0, 0, 4, 5, 60), (1.0, 1.0, 2.0)) == 50).all()


def test_float64_computes_in_float64():
    block = noise((4, 5, 6)).double() + 1e-9
    found = resample(block, (0, 0, 0, 4, 5, 6), (0.4, 1.5, 2.0))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), oracle(block, (0, 0, 0, 4, 5, 6), (0.4, 1.5, 2.0)), rtol=1e-12)


@pytest.mark.parametrize("ratio", [(0.4, 0.4, 0.4), (3, 3, 3), (0.4, 1.6, 3), (2.3, 0.7, 1), (1.5, 2, 0.5)])
def test_ellipsoids_come_back_where_they_were(ratio):
    """ratio: voxels of the model per voxel of the stack."""
    rng = np.random.default_rng(1)
    roi = (5, 20, 9, 45, 68, 73)
    model_um = tuple(s / r for s, r in zip(SPACING, ratio, strict=True))
    coarser = np.maximum(SPACING, model_um)
    for _ in range(4):
        radius = coarser * rng.uniform(3.5, 4.5, 3)
        middle = (np.array(roi[:3]) + roi[3:]) / 2 * SPACING
        centre = middle + rng.uniform(-0.5, 0.5, 3) * coarser
        predictor = ResamplingPredictor(
            Drawing(centre, radius, model_um), spacing_um=model_um, volume_spacing_um=SPACING
        )
        (placed,) = predictor(torch.zeros(1, *roi_shape(roi)), roi).place(roi)
        found = np.zeros(roi_shape(roi), bool)
        found[tuple(slice(placed.roi[a] - roi[a], placed.roi[a + 3] - roi[a]) for a in range(3))] = placed.mask
        wanted = Drawing(centre, radius, SPACING).labels(roi) > 0
        assert (found & wanted).sum() / (found | wanted).sum() > 0.85
        assert found.sum() == pytest.approx(wanted.sum(), rel=0.1)  # a tenth of a voxel all around is 8 %
        distance = np.argwhere(found).mean(0) - np.argwhere(wanted).mean(0)
        assert np.abs(distance * SPACING / coarser).max() < 0.15
        exact = np.concatenate([centre - radius, centre + radius]) / np.tile(SPACING, 2)
        assert np.abs((np.array(placed.box) - exact) * np.tile(SPACING / coarser, 2)).max() < 1


@pytest.mark.parametrize("step", [(1.5, 2.0, 0.5), (0.4, 3.0, 1.25), (1.0, 0.75, 1.0)])
def test_touching_masks_neither_overlap_nor_part(step):
    """A block of the model divided among eight instances is divided in the stack too, up to its faces."""
    roi = (4, 6, 10, 16, 30, 34)
    grid = resampled_roi(roi, step)
    rng = np.random.default_rng(2)
    cuts = [np.sort(rng.choice(np.arange(1, n), 1)) for n in roi_shape(grid)]
    parts = [np.searchsorted(cut, np.arange(n), side="right") for cut, n in zip(cuts, roi_shape(grid), strict=True)]
    labels = 1 + 4 * parts[0][:, None, None] + 2 * parts[1][:, None] + parts[2]
    times = np.zeros(roi_shape(roi), int)
    for placed in restore(to_instances(labels), roi, step).place((0, 0, 0, *roi_shape(roi))):
        times[tuple(slice(placed.roi[a], placed.roi[a + 3]) for a in range(3))] += placed.mask
    # Where three faces meet the product of the three weights is below a half for all eight.
    assert times.max() == 1
    assert (times == 1).mean() > 0.97
    for axis in range(3):
        assert times.take([0, -1], axis).any()


def test_one_voxel_by_hand():
    """Model voxel (1, 2, 0) of a roi that starts at model voxel (2, 1, 10); steps of 3, 1 and a half."""
    found = Instances(boxes=[[1, 2, 0, 2, 3, 2]], scores=[0.7], classes=[4], masks=[np.ones((1, 1, 2), bool)])
    back = restore(found, (6, 1, 5, 12, 9, 8), (3.0, 1.0, 0.5))
    assert back.boxes.tolist() == [[3, 2, 0, 6, 3, 1]]
    assert back.masks[0].shape == (3, 1, 1)
    assert back.masks[0].all()
    assert back.scores.tolist() == [0.7]
    assert back.classes.tolist() == [4]


def test_boxes_between_voxels_and_masks_that_reach_beyond_them():
    """Voxel 1 of x spans 3 to 6 in the stack, its box 3.9 to 5.1: the mask keeps its three voxels."""
    mask = np.ones((1, 1, 1), bool)
    found = Instances(boxes=[[0, 0, 1.3, 1, 1, 1.7]], scores=[1.0], classes=[0], masks=[mask])
    back = restore(found, (0, 0, 0, 1, 1, 12), (1.0, 1.0, 3.0))
    assert back.boxes.tolist() == [[0, 0, 3, 1, 1, 6]]
    assert back.masks[0].shape == (1, 1, 3)
    found = Instances(boxes=[[0, 0, 0.9, 1, 1, 2.2]], scores=[1.0], classes=[0], masks=[np.ones((1, 1, 3), bool)])
    back = restore(found, (0, 0, 0, 1, 1, 12), (1.0, 1.0, 2.0))
    assert back.boxes.tolist() == [[0, 0, 0, 1, 1, 6]]


@pytest.mark.parametrize("step", [(1.7, 0.6, 2.5), (0.7, 3.0, 1.3)])
def test_nothing_lies_beyond_the_volume(step):
    """The last voxel of the model reaches beyond the stack; a mask over all of it is the stack, no more."""
    roi = (0, 0, 0, 7, 10, 11)
    grid = roi_shape(resampled_roi(roi, step))
    whole = Instances(
        boxes=[[-0.5, 0, 0, *grid]], scores=[1.0], classes=[0], masks=[np.ones((grid[0] + 1, *grid[1:]), bool)]
    )
    back = restore(whole, roi, step)
    assert back.boxes.tolist() == [list(roi)]
    assert back.masks[0].shape == roi_shape(roi)
    assert back.masks[0].all()


def test_a_mask_outside_or_too_small_comes_back_empty():
    boxes = [[0, 0, 50, 1, 1, 51], [0, 0, 2, 1, 1, 3], [0, 0, 0, 0, 0, 0]]
    masks = [np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool), np.zeros((0, 0, 0), bool)]
    back = restore(Instances(boxes, np.ones(3), np.zeros(3, int), masks), (0, 0, 0, 4, 4, 6), (0.3, 0.3, 0.3))
    assert len(back) == 3
    assert back.place((0, 0, 0, 4, 4, 6)) == []


def test_no_instances():
    assert len(restore(Instances.empty(), ROI, (0.5, 2.0, 1.0))) == 0


def test_near_spacings_pass_untouched():
    block, instances, seen = noise((4, 5, 6)), Instances.empty(), []

    def inner(*arguments):
        seen.extend(arguments)
        return instances

    predictor = ResamplingPredictor(inner, spacing_um=(2.03, 0.5, 0.393), volume_spacing_um=SPACING)
    assert predictor(block, (1, 2, 3, 5, 7, 9)) is instances
    assert seen[0] is block
    assert seen[1] == (1, 2, 3, 5, 7, 9)


def test_binding_to_a_volume_leaves_the_predictor_alone():
    class Binding(Drawing):
        volume = None

        def for_volume(self, volume):
            bound = Binding(self.centres, self.radii, self.spacing_um)
            bound.volume = volume
            return bound

    predictor = ResamplingPredictor(Binding([[4, 3, 3]], [[3, 2, 2]], (1, 1, 1)), spacing_um=(1, 1, 1))
    volume = ArrayVolume(np.zeros((8, 12, 20), np.uint8), SPACING)
    with pytest.raises(ValueError, match="for_volume"):
        predictor(torch.zeros(1, 8, 12, 20), (0, 0, 0, 8, 12, 20))
    bound = predictor.for_volume(volume)
    assert bound.predictor.volume is volume
    assert predictor.volume_spacing_um is predictor.predictor.volume is None
    assert len(bound(torch.zeros(1, 8, 12, 20), (0, 0, 0, 8, 12, 20))) == 1
    assert bound.predictor.rois == [(0, 0, 0, 16, 6, 8)]
    again = pickle.loads(pickle.dumps(ResamplingPredictor(Instances.empty, spacing_um=(1, 2, 3))))
    assert again.spacing_um == (1.0, 2.0, 3.0)


def test_an_unknown_spacing_and_a_wrong_unit_are_refused():
    predictor = ResamplingPredictor(Instances.empty, spacing_um=(1, 1, 1))
    with pytest.raises(ValueError, match=r"made for \[1.0, 1.0, 1.0\].*--spacing"):
        predictor.for_volume(ArrayVolume(np.zeros((2, 3, 4))))
    with pytest.raises(ValueError, match=r"spacing along x is 400\.0 micrometre.*--spacing"):
        predictor.for_volume(ArrayVolume(np.zeros((2, 3, 4)), (2, 1, 400)))
    with pytest.raises(ValueError, match="--model_spacing keep"):
        at_model_spacing(Instances.empty, None, (1, 1, 1)).for_volume(ArrayVolume(np.zeros((2, 3, 4)), (99, 1, 1)))
    with pytest.raises(ValueError, match="spacing"):
        ResamplingPredictor(Instances.empty, spacing_um=(1, 0, 1))
    with pytest.raises(TypeError, match="returned list"):
        ResamplingPredictor(lambda *_: [], spacing_um=SPACING, volume_spacing_um=SPACING)(noise((2, 3, 4)), ROI)


def test_identity_tells_spacings_and_inner_predictors_apart():
    class Named:
        def __init__(self, name):
            self.name = name

        def identity(self):
            return {"name": self.name}

    inner = [Named("a"), Named("b"), Instances.empty]
    identities = [ResamplingPredictor(i, spacing_um=s).identity() for i in inner for s in (SPACING, (1, 1, 1))]
    assert all(identities.count(i) == 1 for i in identities)
    assert identities[0] == {"resampled_to_um": list(SPACING), "tolerance": 0.02, "predictor": {"name": "a"}}
    assert ResamplingPredictor(inner[0], spacing_um=SPACING, tolerance=0.1).identity() not in identities


def test_batches_are_the_blocks_one_by_one():
    centres, radii, model_um = [[9, 8, 5], [24, 16, 11]], [[6, 3, 2], [5, 3, 3]], (1.3, 0.8, 0.4)
    rois = [(0, 0, 0, 10, 40, 38), (3, 11, 2, 17, 40, 40), (0, 0, 0, 1, 1, 1)]
    blocks = [noise(roi_shape(roi)) for roi in rois]
    assert not hasattr(ResamplingPredictor(Drawing(centres, radii, model_um), spacing_um=model_um), "predict_batch")
    predictor = ResamplingPredictor(
        DrawingBatches(centres, radii, model_um), spacing_um=model_um, volume_spacing_um=SPACING
    )
    together = predictor.predict_batch(blocks, rois)
    assert [len(found) for found in together] == [2, 2, 0]
    for found, block, roi in zip(together, blocks, rois, strict=True):
        alone = predictor(block, roi)
        assert np.array_equal(found.boxes, alone.boxes)
        assert all(np.array_equal(a, b) for a, b in zip(found.masks, alone.masks, strict=True))
    assert predictor.predict_batch([], []) == []


@pytest.mark.parametrize("model_um", [(1.0, 1.0, 1.0), (3.0, 0.4, 0.9)])
def test_a_stack_in_blocks_holds_every_cell_once(model_um):
    """Ellipsoids on a jittered grid; blocks cut through them where the model's voxels do not begin."""
    rng = np.random.default_rng(4)
    shape, pitch = (21, 66, 80), (14.0, 11.0, 10.6)
    size = np.array(shape) * SPACING
    axes = [np.arange(p / 2, s - p / 2 + 0.01, p) for p, s in zip(pitch, size, strict=True)]
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    centres = centres + rng.uniform(-1, 1, centres.shape)
    radii = np.tile([[5.0, 3.5, 3.5]], (len(centres), 1))
    predictor = ResamplingPredictor(Drawing(centres, radii, model_um), spacing_um=model_um)
    volume = ArrayVolume(np.zeros(shape, np.uint8), SPACING)
    labels, table = predict_labels(volume, predictor.for_volume(volume), (13, 23, 31), (6, 14, 17))
    truth = Drawing(centres, radii, SPACING).labels((0, 0, 0, *shape))
    assert len(table) == len(centres) == 27
    for index in range(1, len(centres) + 1):
        ids, counts = np.unique(labels[truth == index], return_counts=True)
        found = labels == ids[counts.argmax()]
        assert (found & (truth == index)).sum() / (found | (truth == index)).sum() > 0.75


def steps_in(predictor, *spacings):
    return [predictor.step_in(ArrayVolume(np.zeros((2, 3, 4)), spacing)) for spacing in spacings]


def test_the_model_spacing_that_is_asked_for_goes_before_that_of_the_checkpoint(caplog):
    caplog.set_level(logging.INFO)
    asked = at_model_spacing(Instances.empty, [2, 1, 1], (2, 0.5, 0.5))
    assert steps_in(asked, (2, 1, 0.97), (1, 1, 1)) == [(1, 1, 1 / 0.97), (2, 1, 1)]
    with pytest.raises(ValueError, match="does not say its voxel size"):
        steps_in(asked, None)
    kept = at_model_spacing(Instances.empty, None, (2, 0.5, 0.5))
    assert steps_in(kept, (2.1, 0.5, 0.46), (2, 0.5, 0.25), None) == [(1, 1, 1), (1, 1, 2), (1, 1, 1)]
    caplog.clear()
    inner = Perfect(TRUTH)
    for trained in (None, (2, 0.5, 0.5)):
        assert at_model_spacing(inner, "keep", trained) is inner
    assert at_model_spacing(inner, None, None) is inner
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "model_spacing is keep",
        "model_spacing is keep",
        "the training had no known voxel size in common",
    ]
    with pytest.raises(ValueError, match=r"model_spacing is 'kep'; pass \[z, y, x\] in micrometre, 'keep' or null"):
        at_model_spacing(Instances.empty, "kep", None)


def test_one_line_says_what_is_done_and_why(caplog):
    caplog.set_level(logging.INFO)
    predictor = at_model_spacing(Instances.empty, None, (2, 0.5, 0.5))
    volumes = [ArrayVolume(np.zeros((2, 3, 4)), s) for s in [(2.1, 0.5, 0.5), (2, 0.25, 0.25), None]]
    for volume in volumes:
        predictor.step_in(volume)
        for _ in range(2):  # time points
            predictor.for_volume(volume)
    assert [record.message for record in caplog.records] == [
        "voxel size (z, y, x) of the model is 2 x 0.5 x 0.5 micrometre, of the stack 2.1 x 0.5 x 0.5: blocks are not "
        "resampled, as they agree to 10%",
        "voxel size (z, y, x) of the model is 2 x 0.5 x 0.5 micrometre, of the stack 2 x 0.25 x 0.25: blocks are "
        "resampled, block_size and halo count the model's voxels; --model_spacing keep does not",
        "voxel size (z, y, x) of the model is 2 x 0.5 x 0.5 micrometre, of the stack unknown: blocks are not "
        "resampled; --spacing '[z,y,x]' says the stack's",
    ]


TRUTH = Drawing([[6, 8, 8], [17, 9, 22], [17, 24, 9]], [[4, 5, 6]] * 3, (1, 1, 1)).labels((0, 0, 0, 24, 32, 40))


@pytest.mark.parametrize("spacing", [(2, 0.5, 0.4), (2.15, 0.46, 0.43), None])
@pytest.mark.filterwarnings("ignore:the voxel spacing is unknown")
def test_where_voxel_sizes_agree_or_are_unknown_not_a_bit_changes(tmp_path, spacing):
    volume = ArrayVolume(np.zeros(TRUTH.shape, np.uint8), spacing)
    options = {"block_size": (12, 16, 16), "halo": (8, 10, 12), "progress": False}
    for name, predictor in (("bare", Perfect(TRUTH)), ("model", at_model_spacing(Perfect(TRUTH), None, SPACING))):
        assert predict_volume(volume, predictor, tmp_path / f"{name}.zarr", **options).num_objects == 3
    assert tree_digest(tmp_path / "bare.zarr") == tree_digest(tmp_path / "model.zarr")
    assert (tmp_path / "bare.instances.parquet").read_bytes() == (tmp_path / "model.instances.parquet").read_bytes()


@pytest.mark.parametrize(
    ("model_um", "block_size", "halo", "read"),
    [
        ((4, 1, 0.4), (16, 16, 8), (8, 10, 5), (12, 13, 18)),  # 24 and 26 voxels of the stack, at its border
        ((1, 0.25, 0.4), (4, 4, 8), (3, 3, 5), (20, 20, 18)),
    ],
)
def test_block_and_halo_count_the_voxels_of_the_model(tmp_path, model_um, block_size, halo, read):
    """A model of twice the voxel size in z and y, and one of half of it, which sees blocks of 8 voxels and halo."""
    inner = Drawing([[12, 4, 3.2], [34, 4.5, 8.8], [34, 12, 3.6]], [[8, 2.5, 2.4]] * 3, model_um)
    predictor = at_model_spacing(inner, None, model_um)
    volume = ArrayVolume(np.zeros((24, 32, 40), np.uint8), SPACING)
    done = predict_volume(volume, predictor, tmp_path / "x.zarr", (8, 8, 8), (3, 4, 5), progress=False)
    with Journal(done.journal) as journal:
        plan = journal.fact("plan")
    assert (plan["block_size"], plan["halo"]) == (list(block_size), list(halo))
    assert np.max([roi_shape(roi) for roi in inner.rois], axis=0).tolist() == list(read)
    truth = Drawing(inner.centres, inner.radii, SPACING).labels((0, 0, 0, *volume.shape[1:]))
    labels, table = predict_labels(volume, predictor, (8, 8, 8), (3, 4, 5))
    assert len(table) == done.num_objects == 3
    assert ((labels > 0) == (truth > 0)).mean() > 0.97
    report = seam_check(volume, predictor, block_size=(8, 8, 8), halo=(3, 4, 5), progress=False)
    assert (report.block_size, report.halo) == (block_size, halo)
