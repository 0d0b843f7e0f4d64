"""MuJoCo worlds of several tasks, a planner on the true simulator as their expert, and disturbances."""
