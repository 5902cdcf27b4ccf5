"""`python -m lrmt.evaluation.harness`: `lm_eval` itself, which then knows the model `lrmt`."""

from lrmt.evaluation.harness.run import main

main()
