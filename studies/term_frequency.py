"""The paper's term-frequency study: so far, the counts.

    python -m studies.term_frequency count --data=PREFIX --output=counts --questions=triviaqa.jsonl
"""

import sys

from config import command
from studies.term_counts import Count, count

if __name__ == "__main__":
    command(sys.argv[1:], {"count": (Count, count)})
