"""What is to be remembered: every task turns (split, seed, index, length) into one tokenised example."""
