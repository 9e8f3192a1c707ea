"""The parts of `.ci/gpu`: what a run on a GPU finds out beside the tests, the speed comparison and the examples."""
