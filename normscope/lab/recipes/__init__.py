"""Full-size trainings: what is trained on what, as data, and the one engine that runs, stops and resumes them."""
