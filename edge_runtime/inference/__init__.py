"""From raw inputs to answers: preprocessing, feeds, execution providers, sessions and the runner."""
