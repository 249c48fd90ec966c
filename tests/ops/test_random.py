import pytest
import torch

from s2s_kernels.ops.random import draw_seed, keep_mask, philox, threshold

# Known answers of Random123's philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    ours = philox([torch.tensor(c) for c in counter], (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(word) for word in ours) == words


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_the_share_that_is_kept(p):
    mask = keep_mask(torch.tensor([-(2**62) - 1, 2**63 - 2]), (200, 517), p)
    assert abs(mask.double().mean().item() - (1 - p)) < 5e-3
    assert bool(mask.all()) == (p == 0) and bool(mask.any()) == (p < 1)


def test_elements_do_not_depend_on_the_size_of_what_is_around_them():
    seed = torch.tensor([12345, 678])
    whole = keep_mask(seed, (9, 100), 0.5)
    assert torch.equal(keep_mask(seed, (9, 37), 0.5), whole[:, :37])
    assert torch.equal(keep_mask(seed, (4, 100), 0.5), whole[:4])
    assert torch.equal(keep_mask(seed, (3, 3, 100), 0.5), whole.view(3, 3, 100))
    assert not torch.equal(keep_mask(seed, (9, 100), 0.5, stream=1), whole)
    assert not torch.equal(keep_mask(seed + 1, (9, 100), 0.5), whole)


def test_the_seed_comes_from_torchs_generator():
    torch.manual_seed(5)
    first = draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not torch.equal(draw_seed(torch.device("cpu")), first)
    assert first.dtype == torch.int64 and first.shape == (2,)


def test_threshold():
    assert (threshold(0.0), threshold(0.5), threshold(1.0)) == (0, 2**31, 2**32)
