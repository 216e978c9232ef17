"""What is learnt: tasks, pre-training objectives, and how their losses become one."""
