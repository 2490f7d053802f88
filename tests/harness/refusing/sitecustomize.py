"""On the path of the processes that an unmarked test starts: they end where they import the engine."""

import os
import sys


class _Refusing:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.startswith("megatron.core."):
            sys.stderr.write(f"a process of a test imports {name}: mark the test with pytest.mark.engine\n")
            sys.stderr.flush()
            os._exit(70)


sys.meta_path.insert(0, _Refusing())  # type: ignore[arg-type]
