"""The shells around loop, guard and tools that make them ROS 2 nodes; nothing else imports rclpy."""
