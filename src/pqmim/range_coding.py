"""Entropy coding of tokens: frequencies and tokens in, bytes out, and back.

The only module that imports constriction, whose range coder (a queue: first in, first out) does the work, or
`plain_range_coder` where there is none, as on Linux on Arm. A writer and the readers share one method, `code`, so that
one loop drives both directions.

The payload is a fraction in [0, 1), written as base-256 digits, most significant first, as short as can be.
`TokenReader` continues it with zeros. For given frequencies each sequence of tokens has exactly one payload.

Of a partial file's payload only the leading digits are there. `PrefixReader` returns the tokens which these
determine, whatever the missing digits were, and then no more.

Encoder and decoder must hand over bit-identical frequencies: one unit of difference in one of them garbles
all that follows. That is why they are integers; k / 2**16 is exact in float32, which constriction wants.
docs/format.md gives the arithmetic in full.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pqmim.errors import DamagedFileError

try:
    import constriction
except ImportError:
    from pqmim import plain_range_coder

    _queue: Any = plain_range_coder
    _MODEL_FAMILY = None
else:
    _queue = constriction.stream.queue
    # perfect=False must be given: constriction 0.5.0 still defaults to the slow variant, and announces a change.
    _MODEL_FAMILY = constriction.stream.model.Categorical(perfect=False)

PRECISION = 16
"""Frequencies of one token sum to 2**PRECISION."""

IntArray = NDArray[np.integer[Any]]

_WORD_BYTES = 4  # constriction shifts 32-bit words out of a 64-bit state
_STATE_BITS = 64


class TokenCoder(Protocol):
    """What the step loop needs: it neither knows nor cares whether tokens are written or read."""

    def code(self, frequencies: IntArray, tokens: IntArray | None = None) -> NDArray[np.int64]:
        """Code n tokens, which are independent given the frequencies.

        Args:
            frequencies: (n, K) integers >= 1, each row sums to 2**PRECISION; K >= 2.
            tokens: (n,) integers in [0, K) to write. A reader takes no notice of them.

        Returns:
            (n,) the tokens written or read. A reader may return fewer, the leading ones of the n, when its data
            does not determine the others; from then on it returns none.
        """


class TokenWriter:
    """Turns tokens into a payload; a `TokenCoder`."""

    def __init__(self) -> None:
        self._encoder = _queue.RangeEncoder()

    def code(self, frequencies: IntArray, tokens: IntArray | None = None) -> NDArray[np.int64]:
        """Append n tokens, see `TokenCoder.code`.

        Raises:
            ValueError: frequencies or tokens are not as described there.
        """
        return self.code_probabilities(_probabilities(frequencies), tokens)

    def code_probabilities(self, probabilities: NDArray[np.float32], tokens: IntArray | None) -> NDArray[np.int64]:
        """The same for frequencies that were checked and converted already."""
        num_tokens, alphabet_size = probabilities.shape
        if tokens is None or tokens.shape != (num_tokens,):
            raise ValueError(f"{num_tokens} rows of frequencies need as many tokens")
        if num_tokens == 0:
            return np.empty(0, np.int64)
        if tokens.min() < 0 or tokens.max() >= alphabet_size:
            raise ValueError(f"a token is outside [0, {alphabet_size})")
        self._encoder.encode(tokens.astype(np.int32), _MODEL_FAMILY, probabilities)
        return tokens.astype(np.int64)

    def finish(self) -> bytes:
        """Return the payload of all tokens so far: about their information content plus 1 byte."""
        low, width, num_bytes = self._interval()
        # Keep the number in the interval that has the most zero bits at its end, by whole bytes.
        shortest = low
        for zero_bits in range(8, _STATE_BITS + 1, 8):
            candidate = -(-low >> zero_bits) << zero_bits
            if candidate >= low + width:
                break
            shortest = candidate
        return shortest.to_bytes(num_bytes, "big").rstrip(b"\0")

    def prefix_of(self, payload: bytes) -> bytes:
        """Return the first digits of a payload, as many as a `PrefixReader` needs to read the tokens so far.

        Args:
            payload: complete, of a message that begins with these tokens.
        """
        if self._encoder.is_empty():
            return b""
        low, width, num_bytes = self._interval()
        digits = payload.ljust(num_bytes, b"\0")
        for num_digits in range(num_bytes - _STATE_BITS // 8, num_bytes + 1):
            num_numbers = 1 << 8 * (num_bytes - num_digits)  # that begin with the same digits
            first = int.from_bytes(digits[:num_digits], "big") * num_numbers
            if low <= first and first + num_numbers <= low + width:
                break
        return digits[:num_digits]

    def _interval(self) -> tuple[int, int, int]:
        """Return low, width and n: the tokens so far are told by any number in [low, low + width) / 256**n."""
        # constriction gives away only the last 64 bits of `low`; the words it would write hold the rest.
        words: NDArray[np.uint32] = self._encoder.get_compressed()
        num_words_shifted_out: int
        num_words_shifted_out, (low_tail, width) = self._encoder.pos()
        num_bytes = num_words_shifted_out * _WORD_BYTES + _STATE_BITS // 8
        inside = int.from_bytes(words.astype(">u4").tobytes().ljust(num_bytes, b"\0"), "big")
        return inside - (inside - low_tail) % (1 << _STATE_BITS), width, num_bytes


class TokenReader:
    """Turns a payload back into tokens; a `TokenCoder`."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._decoder = _decoder(payload, b"\0")
        self._rewriter = TokenWriter()

    def code(self, frequencies: IntArray, tokens: IntArray | None = None) -> NDArray[np.int64]:
        """Read n tokens, see `TokenCoder.code`.

        Raises:
            ValueError: frequencies are not as described there.
            DamagedFileError: no tokens have this payload.
        """
        probabilities = _probabilities(frequencies)
        if probabilities.shape[0] == 0:
            return np.empty(0, np.int64)
        try:
            decoded = self._decoder.decode(_MODEL_FAMILY, probabilities)
        except AssertionError:  # how constriction says it
            raise DamagedFileError("the payload cannot be decoded") from None
        return self._rewriter.code_probabilities(probabilities, decoded)

    def finish(self) -> None:
        """Check that the payload is the one that a writer makes of the tokens read.

        Raises:
            DamagedFileError: it is not, for instance because bytes are left over.
        """
        if self._rewriter.finish() != self._payload:
            raise DamagedFileError("the payload does not end where its tokens end")


class PrefixReader:
    """Turns the first digits of a payload back into the leading tokens that they determine; a `TokenCoder`.

    The missing digits may be anything, so the number lies between the digits continued with zeros and the digits
    continued with 0xFF. A token is determined as long as both ends, and so all numbers between them, decode to the
    same tokens up to and including this one. An end that no tokens have determines nothing further.
    """

    def __init__(self, payload: bytes) -> None:
        self._low = _decoder(payload, b"\0")
        self._high = _decoder(payload, b"\xff")
        self._ended = False

    def code(self, frequencies: IntArray, tokens: IntArray | None = None) -> NDArray[np.int64]:
        """Read up to n tokens, see `TokenCoder.code`; after fewer than n, none at all.

        Raises:
            ValueError: frequencies are not as described there.
        """
        probabilities = _probabilities(frequencies)
        if self._ended or probabilities.shape[0] == 0:
            return np.empty(0, np.int64)
        low = _decode_leading(self._low, probabilities)
        high = _decode_leading(self._high, probabilities)
        num_both = min(len(low), len(high))
        differing = np.flatnonzero(low[:num_both] != high[:num_both])
        num_determined = int(differing[0]) if len(differing) else num_both
        self._ended = num_determined < len(probabilities)
        return low[:num_determined].astype(np.int64)


def _decoder(payload: bytes, continuation: bytes) -> Any:
    """Return a decoder of the payload's digits, continued with one digit; constriction itself goes on with zeros.

    16 digits more are as good as endlessly many. With zeros that is plain. With 0xFF, let n be the payload's digits and
    c those that the decoder has taken up. Its range counts units of 256**-c and is below 2**64. While both ends of a
    `PrefixReader` agree, both lie in the range, so it is more than their distance of 256**(c - n) - 1 units. Hence
    c - n < 8: what follows is looked at only after the ends have parted.
    """
    padding = -len(payload) % _WORD_BYTES + 16
    words = np.frombuffer(payload + continuation * padding, ">u4").astype(np.uint32)
    return _queue.RangeDecoder(words)


def _decode_leading(decoder: Any, probabilities: NDArray[np.float32]) -> NDArray[np.int32]:
    """Decode tokens up to the first one, if any, at which the data is impossible.

    If there is one, the decoder is of no use afterwards.
    """
    before = decoder.clone()
    decoded: NDArray[np.int32]
    try:
        decoded = decoder.decode(_MODEL_FAMILY, probabilities)
    except AssertionError:  # constriction then returns nothing, so look for the place by halves
        half = len(probabilities) // 2
        if half == 0:
            return np.empty(0, np.int32)
        decoded = _decode_leading(before, probabilities[:half])
        if len(decoded) == half:
            decoded = np.concatenate([decoded, _decode_leading(before, probabilities[half:])])
    return decoded


def _probabilities(frequencies: IntArray) -> NDArray[np.float32]:
    """Check frequencies (n, K) and return them as exact float32 probabilities."""
    if frequencies.ndim != 2 or frequencies.shape[1] < 2 or not np.issubdtype(frequencies.dtype, np.integer):
        raise ValueError("frequencies must be an (n, K) array of integers with K >= 2")
    probabilities = frequencies.astype(np.float32)
    probabilities *= np.float32(1 / (1 << PRECISION))
    # Sums of positive numbers, exact up to 2^24 / 2^16, so that they are one only where the integers' sums are right.
    sums = probabilities @ np.ones(frequencies.shape[1], np.float32)
    if frequencies.size and (frequencies.min() < 1 or (sums != 1).any()):
        raise ValueError(f"frequencies must be at least 1 and sum to 2**{PRECISION} in each row")
    return probabilities
