"""Entropy coding of tokens: frequencies and tokens in, bytes out, and back.

The only module that imports constriction, whose range coder (a queue: first in, first out) does the work. A
writer and a reader share one method, `code`, so that one loop drives both directions.

The payload is a fraction in [0, 1), written as base-256 digits, most significant first, as short as can be.
The reader continues it with zeros. For given frequencies each sequence of tokens has exactly one payload.

Encoder and decoder must hand over bit-identical frequencies: one unit of difference in one of them garbles
all that follows. That is why they are integers; k / 2**16 is exact in float32, which constriction wants.
docs/format.md gives the arithmetic in full.
"""

from typing import Any, Protocol

import constriction
import numpy as np
from numpy.typing import NDArray

from pqmim.errors import DamagedFileError

PRECISION = 16
"""Frequencies of one token sum to 2**PRECISION."""

IntArray = NDArray[np.integer[Any]]

# perfect=False must be given: constriction 0.5.0 still defaults to the slow variant, and announces a change.
_MODEL_FAMILY = constriction.stream.model.Categorical(perfect=False)
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
            (n,) the tokens written or read.
        """


class TokenWriter:
    """Turns tokens into a payload; a `TokenCoder`."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def code(self, frequencies: IntArray, tokens: IntArray | None = None) -> NDArray[np.int64]:
        """Append n tokens, see `TokenCoder.code`.

        Raises:
            ValueError: frequencies or tokens are not as described there.
        """
        probabilities = _probabilities(frequencies)
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
        # The tokens are told by any number in [low, low + width), counted in units of the state's last bit.
        # constriction gives away only the last 64 bits of `low`; the words it would write hold the rest.
        words: NDArray[np.uint32] = self._encoder.get_compressed()
        num_words_shifted_out: int
        num_words_shifted_out, (low_tail, width) = self._encoder.pos()
        num_bytes = num_words_shifted_out * _WORD_BYTES + _STATE_BITS // 8
        inside = int.from_bytes(words.astype(">u4").tobytes().ljust(num_bytes, b"\0"), "big")
        low = inside - (inside - low_tail) % (1 << _STATE_BITS)
        # Keep the number in the interval that has the most zero bits at its end, by whole bytes.
        shortest: int = low
        for zero_bits in range(8, _STATE_BITS + 1, 8):
            candidate = -(-low >> zero_bits) << zero_bits
            if candidate >= low + width:
                break
            shortest = candidate
        return shortest.to_bytes(num_bytes, "big").rstrip(b"\0")


class TokenReader:
    """Turns a payload back into tokens; a `TokenCoder`."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        padding = -len(payload) % _WORD_BYTES + _STATE_BITS // 8
        words = np.frombuffer(payload + bytes(padding), ">u4").astype(np.uint32)
        self._decoder = constriction.stream.queue.RangeDecoder(words)
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
        return self._rewriter.code(frequencies, decoded)

    def finish(self) -> None:
        """Check that the payload is the one that a writer makes of the tokens read.

        Raises:
            DamagedFileError: it is not, for instance because bytes are left over.
        """
        if self._rewriter.finish() != self._payload:
            raise DamagedFileError("the payload does not end where its tokens end")


def _probabilities(frequencies: IntArray) -> NDArray[np.float32]:
    """Check frequencies (n, K) and return them as exact float32 probabilities."""
    if frequencies.ndim != 2 or frequencies.shape[1] < 2 or not np.issubdtype(frequencies.dtype, np.integer):
        raise ValueError("frequencies must be an (n, K) array of integers with K >= 2")
    if frequencies.size and (frequencies.min() < 1 or (frequencies.sum(axis=1) != 1 << PRECISION).any()):
        raise ValueError(f"frequencies must be at least 1 and sum to 2**{PRECISION} in each row")
    return frequencies.astype(np.float32) / np.float32(1 << PRECISION)
