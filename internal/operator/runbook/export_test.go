package runbook

import "time"

// Begins tells when each agent of the first fleet begins.
func Begins(o PlanOptions) []time.Duration {
	var f fleet
	f.draw(o, 0)
	return f.begins
}
