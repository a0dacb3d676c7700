"""Try the patterns of a tokenizer on short texts, in a process of its own with little memory and processor time.

The library's patterns backtrack: one like (a+)+$ takes time that doubles with every character of a text. This file is
run as a script with a JSON list of patterns as input. It ends with status 1 and the reason on standard output, or by a
signal, where a pattern is not to be used.
"""

import itertools
import json
import os
import resource
import signal
import sys

from tokenizers import Regex, pre_tokenizers

SECONDS, MEMORY = 0.5, 2**31
ORDINARY = 'It is a truth (so they say) that 1,234 people - of 56789 - don\'t read "all" of http://a.b/c_d?e=f&g=H. '
RUNS = "aA1 -_.,=/\t\n\xe9\u4e2d\u0301"
N_CHARS, N_OWN = 2000, 64


def main() -> None:
    patterns = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    for pattern in patterns:
        # A pattern is slow on what it almost matches: a character many times, and then another than it wants. Its own
        # characters may have to follow, because a search ends at once where a character that it needs is absent.
        own = list(dict.fromkeys(pattern))[:N_OWN]
        starts = [ORDINARY * (N_CHARS // len(ORDINARY)), *(run * N_CHARS for run in dict.fromkeys([*RUNS, *own]))]
        ends = ["\1", "\1" + "".join(own), "\n\1" + "".join(own)]
        try:
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            for start, end in itertools.product(starts, ends):
                split.pre_tokenize_str(start + end)
        except BaseException as error:  # a panic of the library is one
            print(f"fails on a short text ({error!s:.200})", flush=True)
            os._exit(1)


if __name__ == "__main__":
    main()
