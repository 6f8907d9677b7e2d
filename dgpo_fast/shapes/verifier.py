"""A judge of images of the shapes world that looks at pixels only: which objects are there, and are they the caption's?

Legend: C channels, H W image or a part of it, N pixels of an object, K colours or shapes, R required and D detected
objects.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dgpo_fast.shapes.captions import BACKGROUND, COLORS, SHAPES, Caption
from dgpo_fast.shapes.render import excess, signed_distance

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

OBJECT_DISTANCE = 0.4
"""RGB distance to the background from which a pixel belongs to an object or speck: half of yellow's, the palest."""
FAINT_DISTANCE = 0.3
"""RGB distance to the background from which a pixel must belong to an object or count as stray: no ghosts."""
OBJECT_PIXELS = 30
"""Smallest connected area that is an object and no speck; the smallest rendered one has 144 pixels."""
HALO_PIXELS = 3
"""Width of the border around an object in which faint pixels are its blurred edge, not strays."""
EDGE_PIXELS = 2
"""Width of the border inside an object that the background shines through, so that its colour is not judged there."""
STRICT_STRAYS = 12
"""Stray pixels that a strict verdict still overlooks."""
RUINOUS_STRAYS = 400
"""Stray pixels, the area of an object, that make an image worthless."""
COLOR_MARGIN = 0.2
"""RGB distance by which a pixel is nearer to its colour than to any other, to count in full (red and yellow: 0.57)."""
SHAPE_FIT = (0.7, 0.92)
"""Overlap with the ideal shape that counts nothing, and in full; a diamond and a circle of its area overlap by 0.83."""
SHAPE_MARGIN = 0.08
"""Overlap by which the right shape beats the others, to count in full; for an ideal circle or square it is 0.16."""
RELATION_MARGIN = 6.0
"""Pixels of `render.excess` by which a relation counts in full; rendered ones have 36 and more."""
SIZE_TOO_SMALL = (6.0, 13.0)
SIZE_TOO_LARGE = (28.0, 42.0)
"""Longer sides of a bounding box, in pixels, between which an object fades in or out; rendered ones have 17 to 19."""
STRICT_PART = 0.9
"""What each of colour, shape and size must reach for a strict verdict."""

_REFERENCE_KC: Floats = np.array([*COLORS.values(), BACKGROUND]) / 255.0
_COLOR_INDEX = {color: index for index, color in enumerate(COLORS)}
_SHAPE_INDEX = {shape: index for index, shape in enumerate(SHAPES)}
_UNIT_AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0}
"""Area of the shapes whose bounding box is [-1, 1] x [-1, 1]."""
_UNIT_CENTROID_Y = {"circle": 0.0, "square": 0.0, "triangle": 1.0 / 3.0}
"""Height of their centroid, y downwards."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an image shows exactly what its caption says, and how nearly, in [0, 1]."""

    strict: bool
    soft: float


@dataclass(frozen=True, slots=True)
class _Detection:
    """How clearly an object has each colour [K], each shape [K] and a usual size, in [0, 1]; its centre in pixels."""

    color_K: Floats
    shape_K: Floats
    size: float
    x: float
    y: float


def verify(image: npt.NDArray[np.float32], caption: Caption) -> Verdict:
    """Whether `image` shows exactly the objects of `caption`, and how nearly.

    The detected objects are the 4-connected components, of at least `OBJECT_PIXELS`, of the pixels farther than
    `OBJECT_DISTANCE` from the background. Strays are the pixels farther than `FAINT_DISTANCE` from the background and
    more than `HALO_PIXELS` away from every object: specks, haze, ghosts.
    With ramp(v, a, b) = clip((v - a) / (b - a), 0, 1), object d fits required object r, of a colour and a shape, by

        color   = mean over the interior of d of ramp(d_other - d_r, -COLOR_MARGIN, COLOR_MARGIN), where d_r is the RGB
                  distance to r's colour, and d_other that to the nearest other colour or the background
        shape   = ramp(iou_r, *SHAPE_FIT) * ramp(iou_r - iou_other, -SHAPE_MARGIN, SHAPE_MARGIN), where iou_r is the
                  intersection over union of d with the ideal shape r of d's area and centroid, and iou_other the best
                  of the other shapes'
        size    = ramp(side, *SIZE_TOO_SMALL) * (1 - ramp(side, *SIZE_TOO_LARGE)), side the longer one of d's box
        quality = size * (color + shape) / 2

    R required and D detected objects are matched one to one so that soft becomes greatest:

        soft     = relation * sum of matched qualities / max(R, D) * (1 - ramp(strays, 0, RUINOUS_STRAYS))
        relation = (1 + ramp(excess, -RELATION_MARGIN, RELATION_MARGIN)) / 2, with `render.excess` between centres of
                   bounding boxes: half where another relation holds by the margin, and where an object is missing;
                   3/4 where neither does more than the other, on a diagonal (1 where the caption states no relation)
        strict   = R = D, each matched color, shape and size >= STRICT_PART, excess > 0, strays <= STRICT_STRAYS

    A strict image has soft > 0.58 (3/4 of the square of STRICT_PART, less 3 % for strays), a blank one 0.

    Area and centroid place the ideal shape, not the bounding box: blur takes the tip off a triangle, and so shrinks the
    box by far more than the shape.

    Args:
        image: float32 [3, H, W], RGB in [0, 1], at the scale of `render.IMAGE_SIZE`: all thresholds are in its pixels.
        caption: what the image should show.
    """
    detections, strays = _detect(image)
    if not detections:
        return Verdict(strict=False, soft=0.0)
    required = [item for item in caption.items for _ in range(item.count)]
    color_RD = np.stack([d.color_K for d in detections], axis=1)[[_COLOR_INDEX[item.color] for item in required]]
    shape_RD = np.stack([d.shape_K for d in detections], axis=1)[[_SHAPE_INDEX[item.shape] for item in required]]
    size_D = np.array([d.size for d in detections])
    quality_RD = size_D * (color_RD + shape_RD) / 2.0
    matching = _match(quality_RD, caption, detections)
    relation_excess = _relation_excess(caption, [detections[column] for column in matching[1]])
    tidiness = 1.0 - _ramp(strays, 0.0, RUINOUS_STRAYS)
    soft = _relation_factor(relation_excess) * quality_RD[matching].sum() / max(quality_RD.shape) * tidiness
    worst_part = min(color_RD[matching].min(), shape_RD[matching].min(), size_D[matching[1]].min())
    exact_count = len(required) == len(detections)
    strict = exact_count and worst_part >= STRICT_PART and relation_excess > 0.0 and strays <= STRICT_STRAYS
    return Verdict(strict=bool(strict), soft=float(soft))


def _detect(image: npt.NDArray[np.float32]) -> tuple[list[_Detection], int]:
    """The objects of an image, and the number of its stray pixels."""
    offset_CHW = image - _REFERENCE_KC[-1, :, None, None]
    distance_HW = np.sqrt(np.einsum("chw,chw->hw", offset_CHW, offset_CHW))
    labels_HW, _ = ndimage.label(distance_HW > OBJECT_DISTANCE)
    is_object = np.bincount(labels_HW.ravel()) >= OBJECT_PIXELS
    is_object[0] = False
    objects_HW = is_object[labels_HW]
    interior_HW = ndimage.minimum_filter(objects_HW, 2 * EDGE_PIXELS + 1)
    strays_HW = (distance_HW > FAINT_DISTANCE) & ~ndimage.maximum_filter(objects_HW, 2 * HALO_PIXELS + 1)
    boxes = ndimage.find_objects(labels_HW)
    detections = []
    for label in np.flatnonzero(is_object):
        rows, columns = box = boxes[label - 1]
        mask_HW = labels_HW[box] == label
        inside_HW = mask_HW & interior_HW[box]
        # A thin object, a ring or a bar, is all edge.
        pixels_CN = image[:, *box][:, inside_HW if inside_HW.any() else mask_HW]
        side = max(mask_HW.shape)
        detection = _Detection(
            color_K=_color_parts(pixels_CN),
            shape_K=_shape_parts(mask_HW),
            size=float(_ramp(side, *SIZE_TOO_SMALL) * (1.0 - _ramp(side, *SIZE_TOO_LARGE))),
            x=(columns.start + columns.stop) / 2.0,
            y=(rows.start + rows.stop) / 2.0,
        )
        detections.append(detection)
    return detections, int(np.count_nonzero(strays_HW))


def _color_parts(pixels_CN: npt.NDArray[np.float32]) -> Floats:
    """How clearly pixels have each of the colours: [K] in [0, 1]."""
    offset_NKC = pixels_CN.T[:, None] - _REFERENCE_KC
    distance_NK = np.sqrt(np.einsum("nkc,nkc->nk", offset_NKC, offset_NKC))
    parts_K: Floats = _ramp(_leads(-distance_NK), -COLOR_MARGIN, COLOR_MARGIN).mean(axis=0)
    return parts_K[: len(COLORS)]


def _shape_parts(mask_HW: Mask) -> Floats:
    """How clearly a mask has each of the shapes: [K] in [0, 1]."""
    y_N, x_N = np.nonzero(mask_HW)
    x_W, y_H = np.arange(mask_HW.shape[1]) - x_N.mean(), np.arange(mask_HW.shape[0]) - y_N.mean()
    overlap_K = np.empty(len(SHAPES))
    for index, shape in enumerate(SHAPES):
        radius = np.sqrt(len(x_N) / _UNIT_AREA[shape])
        ideal_HW = signed_distance(shape, x_W / radius, (y_H / radius + _UNIT_CENTROID_Y[shape])[:, None]) <= 0.0
        common = np.count_nonzero(ideal_HW & mask_HW)
        # Both areas are the mask's: counted pixels would miss the part of the ideal that reaches out of the mask's box.
        overlap_K[index] = common / (2 * len(x_N) - common)
    return _ramp(overlap_K, *SHAPE_FIT) * _ramp(_leads(overlap_K), -SHAPE_MARGIN, SHAPE_MARGIN)


def _match(quality_RD: Floats, caption: Caption, detections: list[_Detection]) -> tuple[Indices, Indices]:
    """The best matching of required and detected objects: its rows, ascending, and columns in `quality_RD`."""
    if caption.relation is None or len(detections) < 2:
        rows, columns = linear_sum_assignment(quality_RD, maximize=True)
        return rows, columns

    # The relation is of both objects at once, so no sum over single matches finds the best pair.
    def score(pair: tuple[int, ...]) -> float:
        factor = _relation_factor(_relation_excess(caption, [detections[column] for column in pair]))
        return factor * float(quality_RD[[0, 1], pair].sum())

    return np.arange(2), np.array(max(itertools.permutations(range(len(detections)), 2), key=score))


def _relation_excess(caption: Caption, matched: list[_Detection]) -> float:
    """Pixels by which a caption's relation holds: inf if it has none, -inf if one of its objects is missing."""
    if caption.relation is None:
        return np.inf
    if len(matched) < 2:
        return -np.inf
    first, second = matched
    return excess(caption.relation, second.x - first.x, second.y - first.y)


def _relation_factor(relation_excess: float) -> float:
    """What is left of the soft score when a relation holds by so many pixels: from 1/2 to 1."""
    return (1.0 + float(_ramp(relation_excess, -RELATION_MARGIN, RELATION_MARGIN))) / 2.0


def _leads(score_K: Floats) -> Floats:
    """How far each score along the last axis exceeds the best of the others; negative for all but the best."""
    ordered_K = np.sort(score_K, axis=-1)
    best, runner_up = ordered_K[..., -1:], ordered_K[..., -2:-1]
    return score_K - np.where(score_K == best, runner_up, best)


def _ramp(value: Floats | float, low: float, high: float) -> Floats:
    """0 up to `low`, 1 from `high` on, linear between."""
    return np.clip((np.asarray(value) - low) / (high - low), 0.0, 1.0)
