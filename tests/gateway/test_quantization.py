import numpy as np

from gateway.quantization import QUANTIZATIONS, to_binary, to_int8, to_ubinary, to_uint8

# 127 is 0.5 in the first row, and 2 in the second.
VECTORS = np.array([[0.5, -0.25, 0.0, 0.1], [-2.0, 2.0, 1.0, -0.007]], np.float32)
LONG = np.random.default_rng(0).standard_normal((20, 1024)).astype(np.float32)


def cosines(left, right):
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def test_int8_is_a_share_of_the_largest_component():
    made = to_int8(VECTORS)
    assert made.dtype == np.int8
    assert made.tolist() == [[127, -64, 0, 25], [-127, 127, 64, 0]]


def test_uint8_is_int8_plus_128():
    made = to_uint8(VECTORS)
    assert made.dtype == np.uint8
    assert made.tolist() == [[255, 64, 128, 153], [1, 255, 192, 128]]
    np.testing.assert_array_equal(to_uint8(LONG).astype(int) - 128, to_int8(LONG))


def test_bits_are_those_of_sentence_transformers():
    from sentence_transformers.util import quantize_embeddings

    for vectors in (VECTORS, LONG, LONG[:, :12]):
        for precision in ("binary", "ubinary"):
            made = QUANTIZATIONS[precision](vectors)
            expected = quantize_embeddings(vectors, precision)
            assert made.dtype == expected.dtype
            np.testing.assert_array_equal(made, expected)


def test_the_first_component_is_the_highest_bit_and_the_last_byte_is_filled_up():
    vectors = np.array([[1, -1, 0, 1, 0, 0, 0, 0, 1], [-1] * 9], np.float32)
    assert to_ubinary(vectors).tolist() == [[0b10010000, 0b10000000], [0, 0]]
    assert to_binary(vectors).tolist() == [[16, 0], [-128, -128]]
    assert (to_ubinary(vectors).dtype, to_binary(vectors).dtype) == (np.uint8, np.int8)


def test_a_vector_of_zeros():
    zeros = np.zeros((1, 8), np.float32)
    made = {kind: quantize(zeros).tolist() for kind, quantize in QUANTIZATIONS.items()}
    assert made == {"int8": [[0] * 8], "uint8": [[128] * 8], "binary": [[-128]], "ubinary": [[0]]}


def test_cosines_stay():
    # A component is off by half of 127 steps at most, 0.4 % of the largest, which has 3 to 4 standard
    # deviations here: 1 % of a typical one, and the cosine is off by half its square.
    assert cosines(LONG, to_int8(LONG)).min() > 1 - 1e-4
    pairs = cosines(LONG[:10], LONG[10:])
    np.testing.assert_allclose(cosines(to_int8(LONG[:10]), to_int8(LONG[10:])), pairs, atol=1e-3)
    assert np.abs(cosines(to_ubinary(LONG[:10]), to_ubinary(LONG[10:])) - pairs).max() > 1e-3, "else no test"
