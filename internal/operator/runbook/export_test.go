package runbook

import "time"

// Starts returns when each agent of the first fleet starts to renew.
func Starts(o PlanOptions) []time.Duration {
	var f fleet
	f.draw(o, 0)
	return f.starts
}
