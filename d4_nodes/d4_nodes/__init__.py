"""What runs on the robot: the fixed-latency loop, the guard, the inference server and the ROS nodes."""
