"""What scores: functions of users, several rewards as one, steps, and the rewards that come with the package."""
