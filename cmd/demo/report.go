package main

import (
	"cmp"
	"fmt"
	"math"
	"time"

	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew/wave"
)

// Seconds is a duration in the report.
type Seconds float64

func seconds(d time.Duration) Seconds {
	return Seconds(math.Round(d.Seconds()*1000) / 1000)
}

// between returns nil if one of the events did not happen.
func between(from, to time.Time) *Seconds {
	if from.IsZero() || to.IsZero() {
		return nil
	}
	s := seconds(to.Sub(from))
	return &s
}

// Report is the result of the demo. The usage text describes the fields; a time is nil if the
// event did not happen.
type Report struct {
	OK       bool      `json:"ok"`
	Broken   []string  `json:"broken"`
	Promises []Promise `json:"promises"`

	SVIDs        int     `json:"svids"`
	Workloads    int     `json:"workloads"`
	Handshakes   int     `json:"handshakes"`
	Failed       int     `json:"failed_handshakes"`
	FirstFailure string  `json:"first_failure"`
	LongestGap   Seconds `json:"longest_gap_seconds"`

	MaxDelay     Seconds  `json:"max_delay_seconds"`
	Delay        Seconds  `json:"delay_seconds"`
	Seen         *Seconds `json:"taint_to_seen_seconds"`
	FirstRenewal *Seconds `json:"taint_to_first_renewal_seconds"`
	InUse        *Seconds `json:"taint_to_in_use_seconds"`
	Settled      *Seconds `json:"taint_to_settled_seconds"`
	Agreed       *Seconds `json:"taint_to_agreed_seconds"`

	Renewals      int `json:"renewals"`
	MostPerSecond int `json:"most_renewals_per_second"`

	JWT          JWT    `json:"jwt"`
	SafeToRemove []Safe `json:"safe_to_remove"`

	Stuck   string  `json:"stuck"`
	Elapsed Seconds `json:"elapsed_seconds"`

	waited    time.Duration // from the taint as the agent saw it to its first renewal
	confirmed bool          // the workloads confirm that the old key is safe to remove
}

// Promise is a property that must hold.
type Promise struct {
	Name     string `json:"name"`
	Promise  string `json:"promise"`
	Measured string `json:"measured"`
	Held     bool   `json:"held"`
}

// JWT has the results for JWT-SVIDs.
type JWT struct {
	SameDuringTaint bool     `json:"same_during_taint"`
	FailedRequests  int      `json:"failed_requests"`
	AfterRemoval    string   `json:"after_removal"` // "replaced" or "kept"; empty without a removal
	Replaced        *Seconds `json:"removal_to_replaced_seconds"`
}

// Safe says whether an old key was safe to remove when it was removed.
type Safe struct {
	Type      string     `json:"type"` // "x509" or "jwt"
	Key       string     `json:"key"`
	Safe      bool       `json:"safe"`
	After     *Seconds   `json:"taint_to_safe_seconds"`
	NotBefore *time.Time `json:"not_before"`
}

// report returns the report of the rotation.
func (d *demo) report() *Report {
	t := d.fleet.total()
	r := &Report{
		SVIDs: d.svids, Workloads: d.workloads,
		Handshakes: t.Calls, Failed: t.Failures, FirstFailure: t.FirstFailure,
		LongestGap:   Seconds(math.Ceil(t.LongestGap.Seconds()*1000) / 1000), // 0 only without a gap
		MaxDelay:     seconds(d.maxDelay),
		Delay:        seconds(d.delay),
		Seen:         between(d.tainted, d.seen),
		FirstRenewal: between(d.tainted, d.firstRenewal),
		InUse:        between(d.tainted, d.inUse),
		Settled:      between(d.tainted, d.settled),
		Agreed:       between(d.tainted, d.agreed),
		Renewals:     len(d.renewals), MostPerSecond: peakPerSecond(d.renewals),
		JWT: JWT{
			SameDuringTaint: !d.removed.IsZero() && d.atRemove.JWTChanges == d.atTaint.JWTChanges,
			FailedRequests:  t.JWTFailures,
			Replaced:        between(d.removed, d.jwtReplaced),
		},
		SafeToRemove: []Safe{
			{Type: metrics.TypeX509, Key: d.old.X509AuthorityID, Safe: d.confirmed, After: between(d.tainted, d.settled)},
			{Type: metrics.TypeJWT, Key: d.old.JWTKeyID},
		},
		Elapsed:   seconds(time.Since(d.screen.start)),
		confirmed: d.confirmed,
	}
	// The delay begins when the agent sees the taint.
	if !d.firstRenewal.IsZero() && !d.seen.IsZero() {
		r.waited = d.firstRenewal.Sub(d.seen)
	}
	if !d.settled.IsZero() {
		r.SafeToRemove[0].NotBefore = &d.settled
	}
	if !d.jwtNotBefore.IsZero() {
		r.SafeToRemove[1].NotBefore = &d.jwtNotBefore
	}
	switch {
	case !d.jwtReplaced.IsZero():
		r.JWT.AfterRemoval = "replaced"
	case !d.removed.IsZero():
		r.JWT.AfterRemoval = "kept"
	}
	if d.stuck != nil {
		r.Stuck = d.stuck.Error()
	}
	r.evaluate()
	return r
}

// evaluate sets the promises from the figures.
func (r *Report) evaluate() {
	p := func(name, promise string, held bool, measured string, args ...any) {
		r.Promises = append(r.Promises, Promise{Name: name, Promise: promise, Measured: fmt.Sprintf(measured, args...), Held: held})
	}
	p("no-gap", "no workload was ever without a valid SVID",
		r.LongestGap == 0, "longest time without one: %v s", r.LongestGap)
	p("no-failed-call", "no call between workloads failed",
		r.Failed == 0 && r.Handshakes > 0, "%d of %d failed", r.Failed, r.Handshakes)
	p("delay", "the agent waited its random delay before it renewed",
		r.Delay < r.MaxDelay && r.waited > 0 && seconds(r.waited) >= r.Delay,
		"delay: %.1f s of at most %v s, waited: %.1f s", r.Delay, r.MaxDelay, r.waited.Seconds())
	p("rate", fmt.Sprintf("at most %d renewals reached the server in any one second", wave.DefaultRate),
		r.MostPerSecond <= wave.DefaultRate && r.Renewals > 0, "most in one second: %d, total: %d", r.MostPerSecond, r.Renewals)
	p("safe", "when agent and server called the old key safe to remove, it was",
		r.confirmed && r.Agreed != nil, "confirmed by the workloads: %s, by the server: %s", yesNo(r.confirmed), yesNo(r.Agreed != nil))
	p("jwt-kept", "the taint changed no JWT-SVID",
		r.JWT.SameDuringTaint && r.JWT.FailedRequests == 0, "unchanged: %s, failed requests: %d", yesNo(r.JWT.SameDuringTaint), r.JWT.FailedRequests)
	p("jwt-replaced", "after the removal every workload got a JWT-SVID of the new key",
		r.JWT.Replaced != nil, "they were %s", cmp.Or(r.JWT.AfterRemoval, "not removed"))
	p("finished", "every step ended in time", r.Stuck == "", "%s", cmp.Or(r.Stuck, "all in time"))

	r.Broken = []string{}
	for _, p := range r.Promises {
		if !p.Held {
			r.Broken = append(r.Broken, p.Name)
		}
	}
	r.OK = len(r.Broken) == 0
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
