"""From noise to pictures: a traced pipeline under any stock scheduler and guidance rule."""
