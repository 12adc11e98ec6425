"""A run or a pipeline to one model file, behind the parity gate.

The package is not called `export`, because `threefold.export` is the public function.
"""
