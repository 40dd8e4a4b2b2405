"""The moving shapes are what their captions say, and the judge reads them back from the pixels, and nothing else."""
import numpy as np
import pytest
import torch

import codec
import shapes


def attributes(caption):
    _, colour, shape, _, direction = caption.split()
    return shape, colour, direction


def balanced(seed, **form):
    """One clip of each caption, through the codec."""
    dct, rng = codec.load("dct"), np.random.default_rng(seed)
    return [dct.decode(dct.encode(shapes.clip(rng, caption=caption, **form)[0])) for caption in shapes.CAPTIONS]


def test_there_are_96_captions_in_product_order():
    assert len(set(shapes.CAPTIONS)) == 96
    assert shapes.CAPTIONS[:2] == ["a red circle moving left", "a red circle moving right"]
    assert shapes.CAPTIONS[4] == "a orange circle moving left"
    assert shapes.CAPTIONS[32] == "a red square moving left"
    assert shapes.CAPTIONS[95] == "a white triangle moving down"


def test_a_clip_is_a_function_of_its_generator_and_all_captions_are_drawn():
    one, two = (shapes.clip(np.random.default_rng(3), size=(48, 64), frames=9) for _ in range(2))
    assert np.array_equal(one[0], two[0])
    assert one[1] == two[1]
    assert one[0].shape == (9, 48, 64, 3)
    assert one[0].dtype == np.uint8
    rng = np.random.default_rng(0)
    assert {shapes.clip(rng, size=8, frames=1)[1] for _ in range(1000)} == set(shapes.CAPTIONS)


def test_the_moves_of_a_clip_are_its_travel_in_equal_parts():
    video, _ = shapes.clip(np.random.default_rng(0), 64, 9, "a white circle moving right")
    gone = shapes.moves(video)
    assert gone.shape == (8,)
    assert np.abs(gone - gone.mean()).max() < 0.05
    _, centre = shapes.centroid(shapes.segment(video)[0])
    assert gone.sum() == pytest.approx(centre[-1, 0] - centre[0, 0], abs=0.05)
    video[3] = 0        # nothing is seen
    assert np.isnan(shapes.moves(video)).tolist() == [False, False, True, True, False, False, False, False]


def test_a_caption_that_does_not_exist_names_the_words_that_do():
    with pytest.raises(ValueError, match="pink.*triangle.*purple.*down"):
        shapes.clip(np.random.default_rng(0), caption="a pink circle moving left")


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_drawing_has_the_area_and_the_centroid_that_the_judge_assumes(shape):
    _, unit = shapes.SHAPES[shape]
    alpha = shapes.coverage(shape, np.array([[41.0, 37.5]]), 20.0, (80, 80))[0]
    assert alpha.sum() == pytest.approx(unit * 400, rel=0.02)
    assert (alpha.sum(0) @ np.arange(0.5, 80)) / alpha.sum() == pytest.approx(41.0, abs=0.1)
    assert (alpha.sum(1) @ np.arange(0.5, 80)) / alpha.sum() == pytest.approx(37.5, abs=0.3)
    assert np.unique(alpha).size > 3                            # a soft edge


def test_the_triangle_points_up():
    alpha = shapes.coverage("triangle", np.array([[16.0, 16.0]]), 8.0, (32, 32))[0]
    assert 0 < alpha[:10].sum() < alpha[16:].sum()
    assert alpha[23:].sum() == 0


@pytest.mark.parametrize("direction, way", [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_the_path_is_straight_steady_inside_the_frame_and_a_third_of_a_side_long(direction, way):
    rng = np.random.default_rng(5)
    for _ in range(20):
        video, _ = shapes.clip(rng, size=(32, 64), caption=f"a white circle moving {direction}")
        alpha, _, _, visible = shapes.segment(video)
        edges = [alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]]
        assert visible.all()
        assert max(edge.max() for edge in edges) == 0
        place = np.stack([alpha.sum(1) @ np.arange(64) / 64, alpha.sum(2) @ np.arange(32) / 32], 1)
        place /= alpha.sum((1, 2))[:, None]
        steps = np.diff(place, axis=0) @ way
        assert 0.24 < steps.sum() < 0.37
        assert steps.std() < 0.1 * steps.mean()


@pytest.mark.parametrize("form", [{}, {"size": (48, 64), "frames": 9}], ids=["32x32x17", "48x64x9"])
def test_the_judge_reads_every_real_clip_after_the_codec(form):
    for caption, video in zip(shapes.CAPTIONS, balanced(0, **form)):
        assert shapes.judge(video) == attributes(caption)


def test_with_shuffled_captions_the_judge_is_at_chance():
    read = [shapes.judge(video) for video in balanced(1)]
    captions = np.random.default_rng(0).permutation(shapes.CAPTIONS)
    right = np.array([[a == b for a, b in zip(seen, attributes(caption))] for seen, caption in zip(read, captions)])
    assert right.all(1).mean() < 0.06
    assert abs(right.mean(0) - [1 / 3, 1 / 8, 1 / 4]).max() < 0.13


def test_noise_black_and_a_flicker_show_nothing():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    assert shapes.judge(noise) == shapes.judge(np.zeros_like(noise)) == (None, None, None)
    latents = torch.randn(24, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    assert shapes.judge(codec.load("dct").decode(latents / 2))[0] is None
    video, caption = shapes.clip(rng)
    video[::4] = video[0, 0, 0]                                 # gone in 5 frames of 17, more than a fifth
    assert shapes.judge(video) == (None, None, None)
    video, caption = shapes.clip(rng)
    video[::6] = video[0, 0, 0]                                 # in 3 of 17
    assert shapes.judge(video) == attributes(caption)


def test_each_attribute_is_rejected_by_itself():
    rng = np.random.default_rng(0)
    video, _ = shapes.clip(rng, caption="a red square moving left")
    assert shapes.judge(video[::-1]) == ("square", "red", "right")
    assert shapes.judge(np.repeat(video[:1], 17, 0)) == ("square", "red", None)         # it stands still
    assert shapes.judge(video[:5]) == ("square", "red", None)                           # it hardly moves
    diagonal = np.stack([np.roll(frame, -i, axis=0) for i, frame in enumerate(video[:, ::-1])])
    assert shapes.judge(diagonal)[2] is None
    assert shapes.judge(video // 3 + video[..., :1] // 3 * 2) == ("square", None, "left")                # pale red
    striped, (alpha, *_) = video.copy(), shapes.segment(video)
    striped[(alpha > 0.5) & (np.indices((32, 32)).sum(0) % 4 < 2)] = video[0, 0, 0]
    assert shapes.judge(striped)[0] is None


def test_colours_are_told_by_hue_and_saturation():
    for name, paint in shapes.COLOURS.items():
        assert shapes.name_colour(np.array(paint) * 0.8) == name
    assert shapes.name_colour(np.array([0.9, 0.1, 0.6])) is None                        # pink: 30 degrees from any
    assert shapes.name_colour(np.array([0.9, 0.9, 0.75])) == "white"                    # a warm white
    assert shapes.name_colour(np.array([0.9, 0.6, 0.6])) is None                        # pale red
    assert shapes.name_colour(np.array([0.93, 0.16, 0.22])) == "red"                    # hue 355, across zero


def test_the_features_are_where_how_large_how_fast_and_how_bright():
    rng = np.random.default_rng(0)
    video, _ = shapes.clip(rng, size=(32, 64), caption="a white square moving right")
    x, y, size, speed, paint, ground = shapes.features(video)
    alpha, *_ = shapes.segment(video)
    assert x == pytest.approx((alpha[0].sum(0) @ np.arange(0.5, 64)) / alpha[0].sum() / 64, abs=0.01)
    assert y == pytest.approx((alpha[0].sum(1) @ np.arange(0.5, 32)) / alpha[0].sum() / 32, abs=0.01)
    assert size == pytest.approx((alpha[0].mean()) ** 0.5, abs=0.01)
    assert 0.24 < speed < 0.37
    assert paint == pytest.approx(0.95, abs=0.02)
    assert ground == pytest.approx(video[0, 0, 0].mean() / 255, abs=0.01)
    assert np.allclose(shapes.features(video[::-1])[[0, 1, 3]], [x + speed, y, speed], atol=0.01)
    assert shapes.features(video[:, ::-1])[1] == pytest.approx(1 - y, abs=0.01)
    for nothing in (np.zeros_like(video), rng.integers(0, 256, video.shape, dtype=np.uint8)):
        assert shapes.features(nothing).shape == (6,)
        assert np.isfinite(shapes.features(nothing)).all()


def test_a_noisy_ground_is_no_part_of_the_object_and_a_faint_object_is_none():
    rng = np.random.default_rng(2)
    for caption in shapes.CAPTIONS[::7]:
        video, _ = shapes.clip(rng, caption=caption)
        noisy = np.clip(video + rng.normal(0, 12, video.shape), 0, 255).astype(np.uint8)
        assert shapes.judge(noisy) == attributes(caption)
        assert shapes.judge(video // 6) == (None, None, None)


# ---- longer clips ----------------------------------------------------------------------------------------------------


def straight(caption, frames=33, seed=1):
    """A clip of the set that goes on straight after its 17 frames, whatever wall it meets; its travel per frame."""
    rng = np.random.default_rng(seed)
    _, colour, shape, _, direction = caption.split()
    travel = 0.3 * 32 / 16 * np.array(shapes.DIRECTIONS[direction])
    centre = 16 - 8 * np.array(shapes.DIRECTIONS[direction]) + np.arange(frames)[:, None] * travel
    ground = np.float32([20, 22, 28])
    cover = shapes.coverage(shape, centre, 6 + rng.random(), (32, 32))[..., None]
    return np.uint8(cover * (np.float32(shapes.COLOURS[colour]) * 255 - ground) + ground)


@pytest.mark.parametrize("caption", ["a red circle moving left", "a blue square moving up",
                                     "a green triangle moving right"])
def test_an_object_that_moves_on_straight_is_judged_right_after_the_first_frames(caption):
    seen = shapes.judge_late(straight(caption), 17, caption)
    assert seen["late colour"] and seen["late shape"] and seen["late direction"]
    assert seen["visible"] == 1
    assert seen["off the path"] < 0.3
    assert 0.5 < seen["step"] < 1.2


def test_what_goes_wrong_after_the_first_frames_shows_in_the_figure_of_it():
    caption = "a red circle moving left"
    video = straight(caption)
    stopped = np.concatenate([video[:18], video[17:18].repeat(15, 0)])
    seen = shapes.judge_late(stopped, 17, caption)
    assert not seen["late direction"]
    assert seen["late shape"] and seen["off the path"] > 1
    other = np.concatenate([video[:17], straight("a blue square moving left")[17:]])
    seen = shapes.judge_late(other, 17, caption)
    assert not seen["late colour"] and not seen["late shape"] and not seen["end shape"]
    back = np.concatenate([video[:17], video[10:26]])
    assert shapes.judge_late(back, 17, caption)["step"] > 3
    gone = np.concatenate([video[:17], np.full_like(video[17:], 20)])
    assert shapes.judge_late(gone, 17, caption) == pytest.approx({"visible": 0, "step": 0.6}, abs=0.3)


def test_after_the_wall_nothing_is_asked_of_path_and_direction():
    caption = "a red circle moving left"
    video = straight(caption, frames=60)
    seen = shapes.judge_late(np.concatenate([video[:27], video[26:27].repeat(33, 0)]), 17, caption)
    assert seen["late direction"] and seen["off the path"] < 0.5
