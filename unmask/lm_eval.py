"""`python -m unmask.lm_eval …`: lm-evaluation-harness's own command line, with the model `unmask` in its table."""

from __future__ import annotations

import sys

from unmask.distributed.failures import report
from unmask.distributed.ranks import leave
from unmask.errors import UnmaskError
from unmask.evaluation.harness import register_model


def main() -> int:
    """Run the harness's command line; return its exit status, 2 after one line for a mistake of the user's."""
    try:
        register_model()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UnmaskError as error:
        return report(str(error), error.exit_status)
    finally:
        leave(10.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
