"""Moving shapes: a captioned dataset of videos made from a seed, and the judge that reads a clip back from its pixels.

One soft-edged shape crosses a dark ground at constant speed: "a red circle moving left". A clip is a pure function of
its generator, so the whole set needs no download; and because every attribute can be measured, the judge says exactly
which captions a model has followed. Imports nothing of ours.

F H W frames, rows, columns of pixels · a video is uint8 (F, H, W, 3) · x to the right, y down, in pixels
"""
import colorsys
from itertools import product

import numpy as np

# name -> its distance to the outline (negative inside) at offsets x, y from the centroid, and its area at r = 1
SHAPES = {
    "circle":   (lambda x, y, r: np.sqrt(x * x + y * y) - r,                        np.pi),
    "square":   (lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.886 * r,             1.772**2),
    "triangle": (lambda x, y, r: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.72 * r, 3 * 3**0.5 * 0.72**2),
}
COLOURS = {
    "red":    (0.93, 0.16, 0.16),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.97, 0.92, 0.15),
    "green":  (0.13, 0.78, 0.22),
    "cyan":   (0.10, 0.85, 0.90),
    "blue":   (0.18, 0.34, 1.00),
    "purple": (0.62, 0.20, 0.95),
    "white":  (0.95, 0.95, 0.95),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAPTIONS = [f"a {c} {s} moving {d}" for s, c, d in product(SHAPES, COLOURS, DIRECTIONS)]

EDGE = 1.5      # px over which coverage falls from 1 to 0
EXTENT = 1.25   # half the widest shape, in r: what must stay inside the frame


def coverage(shape, centre, r, size):
    """How much of each pixel `shape` covers, in [0, 1]: centre (F, 2) as x, y; r a number or (F,), px -> (F, H, W)."""
    H, W = size
    r = np.broadcast_to(r, len(centre)).astype(np.float32)[:, None, None]
    x, y = centre.astype(np.float32).T[:, :, None, None]
    x = np.arange(0.5, W, dtype=np.float32) - x                 # (F, 1, W)
    y = np.arange(0.5, H, dtype=np.float32)[:, None] - y        # (F, H, 1)
    distance, _ = SHAPES[shape]
    return np.clip(0.5 - distance(x, y, r) / EDGE, 0, 1)


def clip(rng, size=32, frames=17, caption=None):
    """One clip drawn with the numpy Generator `rng` -> video uint8 (frames, H, W, 3), caption.

    size: pixels, a number for a square or (H, W); caption: one of CAPTIONS, None = drawn too.
    """
    H, W = (int(n) for n in np.broadcast_to(size, 2))
    if caption is None:
        caption = CAPTIONS[rng.integers(len(CAPTIONS))]
    if caption not in CAPTIONS:
        raise ValueError(f"no such caption: {caption!r}; a caption reads like {CAPTIONS[0]!r}, "
                         f"with {', '.join(SHAPES)}; {', '.join(COLOURS)}; {', '.join(DIRECTIONS)}")
    _, colour, shape, _, direction = caption.split()

    side = np.array([W, H])
    r = rng.uniform(0.19, 0.25) * min(H, W)
    travel = rng.uniform(0.25, 0.36) * side * DIRECTIONS[direction]
    low = EXTENT * r + np.maximum(-travel, 0)                   # where the path may start, so that all of it is inside
    high = side - EXTENT * r - np.maximum(travel, 0)
    path = rng.uniform(low, high) + np.linspace(0, 1, frames)[:, None] * travel

    ground = np.float32(255 * rng.uniform(0.03, 0.14) * np.array([0.8, 0.9, 1.15]))
    paint = np.float32(255 * np.array(COLOURS[colour]))
    video = coverage(shape, path, r, (H, W))[..., None] * (paint - ground) + ground
    return np.rint(video).astype(np.uint8), caption


def direction_alone(caption):
    """"a red circle moving left" -> "moving left": what is left to say where the first frame shows the rest."""
    return " ".join(caption.split()[-2:])


def judge(video):
    """What a clip shows: video uint8 (F, H, W, 3) -> (shape, colour, direction), names as above or None where unclear.

    All three are None unless a single-coloured object is visible in at least 80 % of the frames.
    """
    _, H, W, _ = video.shape
    alpha, paint, _, visible = segment(video)
    if visible.mean() < 0.8:
        return None, None, None
    area, centre = centroid(alpha[visible])
    _, velocity = track(centre / [W, H], visible)
    return name_shape(alpha[visible], area, centre), name_colour(paint[visible].mean(0)), name_direction(velocity)


def judge_late(video, first, caption):
    """What a clip longer than its `first` frames shows after them, where no clip of the set goes: video -> a dict.

    An object that moves on straight meets a wall, which no clip ever shows: its shape, its direction and how far it is
    off the straight path of the first frames are read before that path meets it, from 2 frames or more (direction 4).
      late colour, late shape, late direction   whether they are the caption's
      off the path    largest distance from the path, in pixels
      visible         share of the late frames that show an object
      end shape       whether the shape is the caption's in the last frames, at most twice `first`, wall or not
      step            largest move from a frame to the next, in pixels: jumps where chunks meet
    A figure that cannot be read is not there.
    """
    F, H, W, _ = video.shape
    _, colour, shape, _, direction = caption.split()
    alpha, paint, _, visible = segment(video)
    area, centre = centroid(alpha)
    place, frame, side = centre / [W, H], np.arange(F), np.array([W, H])
    late = visible & (frame >= first)
    end = visible & (frame >= max(first, F - 2 * (first - 1)))
    found = {"visible": visible[first:].mean()}
    if late.any():
        found["late colour"] = name_colour(paint[late].mean(0)) == colour
    if end.any():
        found["end shape"] = name_shape(alpha[end], area[end], centre[end]) == shape
    both = visible[1:] & visible[:-1]
    if both.any():
        found["step"] = np.linalg.norm(np.diff(centre, axis=0), axis=1)[both].max()
    begun = visible[:first]
    if begun.sum() < 2:
        return found
    start, velocity = track(place[:first][begun], begun)
    path = (start + frame[:, None] / (first - 1) * velocity) * side
    reach = EXTENT * np.sqrt(area[:first][begun].mean() / SHAPES[shape][1])
    inside = ((path >= reach) & (path <= side - reach)).all(1)
    before = late & np.logical_and.accumulate(inside | (frame < first))
    if before.sum() >= 2:
        found["late shape"] = name_shape(alpha[before], area[before], centre[before]) == shape
        found["off the path"] = np.linalg.norm(centre - path, axis=1)[before].max()
    if before.sum() >= 4:
        moved = np.polyfit(frame[before], place[before], 1)[0] * (first - 1)
        found["late direction"] = name_direction(moved) == direction
    return found


def features(video):
    """How a clip shows it: video uint8 (F, H, W, 3) -> (6,) start x, y, size, speed, brightness of object and ground.

    Lengths in sides of the frame, speed per clip, brightness in [0, 1]. The variety of a set of clips is measured by
    them; they are finite, if meaningless, for a clip that shows nothing.
    """
    _, H, W, _ = video.shape
    alpha, paint, ground, visible = segment(video)
    visible = visible if visible.any() else np.ones_like(visible)
    area, centre = centroid(alpha[visible])
    start, velocity = track(centre / [W, H], visible)
    size = np.sqrt(area.mean() / (H * W))
    return np.array([*start, size, np.linalg.norm(velocity), paint[visible].mean(), ground[visible].mean()])


def moves(video):
    """How far the object goes from each frame to the next, in px: video uint8 (F, H, W, 3) -> (F - 1,).

    Not a number beside a frame in which none is visible.
    """
    alpha, _, _, visible = segment(video)
    _, centre = centroid(alpha)
    gone = np.linalg.norm(np.diff(centre, axis=0), axis=1)
    return np.where(visible[1:] & visible[:-1], gone, np.nan)


def segment(video):
    """The object and its ground: uint8 (F, H, W, 3) -> alpha (F, H, W), paint and ground (F, 3), visible (F,) bool."""
    F, H, W, _ = video.shape
    pixels = np.float32(video).reshape(F, H * W, 3) / 255
    ground = np.median(pixels, 1, keepdims=True)
    away = np.linalg.norm(pixels - ground, axis=2)              # distance of each pixel's colour from the ground's
    top = max(4, H * W // 100)
    contrast = np.partition(away, -top)[:, -top:].mean(1)
    core = away > 0.75 * contrast[:, None]
    paint = (pixels * core[..., None]).sum(1) / np.maximum(core.sum(1), 1)[:, None]
    axis = paint[:, None] - ground                              # alpha is a pixel's place from ground to paint
    alpha = ((pixels - ground) * axis).sum(2) / np.maximum((axis * axis).sum(2), 1e-6)
    alpha = np.clip(alpha, 0, 1)
    alpha[alpha < 0.15] = 0
    share = alpha.mean(1)
    visible = (contrast > 0.3) & (0.01 < share) & (share < 0.35)
    return alpha.reshape(F, H, W), paint, ground[:, 0], visible


def centroid(alpha):
    """alpha (F, H, W) -> its area (F,) in px and its centre (F, 2) as x, y in px."""
    _, H, W = alpha.shape
    area = alpha.sum((1, 2))
    moments = np.stack([alpha.sum(1) @ np.arange(0.5, W), alpha.sum(2) @ np.arange(0.5, H)], 1)
    return area, moments / np.maximum(area, 1e-6)[:, None]


def track(centre, visible):
    """The least-squares line through the centres of the visible frames -> its start, and its velocity per clip."""
    t = np.flatnonzero(visible) / max(len(visible) - 1, 1)
    away = t - t.mean()
    velocity = away @ centre / max(away @ away, 1e-6)
    return centre.mean(0) - t.mean() * velocity, velocity


def name_shape(alpha, area, centre):
    """The shape whose drawing of the same area and centroid overlaps best: mean soft IoU over frames, 0.75 at least."""
    overlap = {}
    for shape, (_, unit) in SHAPES.items():
        drawn = coverage(shape, centre, np.sqrt(area / unit), alpha.shape[1:])
        overlap[shape] = (np.minimum(alpha, drawn).sum((1, 2)) / np.maximum(alpha, drawn).sum((1, 2))).mean()
    best = max(overlap, key=overlap.get)
    return best if overlap[best] >= 0.75 else None


def name_colour(rgb):
    """White below a saturation of 0.25; else the nearest hue, within 25 degrees and at a saturation of at least 0.4."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb)
    if saturation < 0.25:
        return "white"
    apart = {name: abs((hue - colorsys.rgb_to_hsv(*paint)[0] + 0.5) % 1 - 0.5) * 360
             for name, paint in COLOURS.items() if name != "white"}
    best = min(apart, key=apart.get)
    return best if apart[best] < 25 and saturation >= 0.4 else None


def name_direction(velocity):
    """The nearest axis of a velocity of more than 0.12 widths per clip, the other axis being less than half of it."""
    ahead = {name: velocity @ way for name, way in DIRECTIONS.items()}
    best = max(ahead, key=ahead.get)
    across = abs(velocity).min()
    return best if ahead[best] > 0.12 and across < ahead[best] / 2 else None
