package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew/wave"
)

// demo is a rotation and its measurements.
type demo struct {
	settings
	*system
	screen *screen

	old, new keyset.Keyset
	delay    time.Duration // the agent's random delay for the old key's taint

	// Zero: did not happen.
	tainted, seen, firstRenewal, inUse, settled, agreed, removed, jwtReplaced time.Time

	atTaint, atRemove workloadState // totals of all workloads
	renewals          []renewal     // since the taint
	confirmed         bool          // the workloads confirm that the old key is safe to remove
	jwtNotBefore      time.Time     // expiry of the last JWT-SVID of the old key
	stuck             *stuckError
}

// stuckError is a step that did not end in time.
type stuckError struct {
	step  string
	after time.Duration
}

func (e *stuckError) Error() string { return fmt.Sprintf("%s: not within %v", e.step, e.after) }

// stepTimeout limits a step, without intended delays.
const stepTimeout = 30 * time.Second

// rotate runs the whole demo and cleans up. A broken promise is not an error.
func rotate(ctx context.Context, s settings, screen *screen, log *slog.Logger) (_ *Report, err error) {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	sys, err := newSystem(ctx, s, log, fail)
	defer func() { err = errors.Join(err, sys.close()) }()
	if err != nil {
		return nil, err
	}
	d := &demo{settings: s, system: sys, screen: screen, old: sys.server.Keysets().Active()}
	for _, step := range []func(context.Context, *slog.Logger) error{d.begin, d.prepare, d.activate, d.taint, d.remove, d.finish} {
		if err := step(ctx, log); errors.As(err, &d.stuck) {
			d.event("STUCK", "%v", d.stuck)
			break
		} else if err != nil {
			return nil, err
		}
	}
	return d.report(), nil
}

// begin starts everything and waits for the first calls.
func (d *demo) begin(ctx context.Context, log *slog.Logger) error {
	d.screen.text(
		"renewd demo: the keys that sign all identities on a node are replaced while these are in use.",
		"",
		"An SVID is a workload's identity: a certificate with its key, signed by the server's signing key.",
		"The agent fetches SVIDs from the server, renews them and delivers them to the workloads of its node.",
		"")
	d.event("server", "signs with the old key (keyset %s) at %s", d.old.ID, d.address)
	if err := d.startAgent(ctx, d.settings, log); err != nil {
		return err
	}
	if err := d.waitUntil(ctx, "the agent joins", stepTimeout, func() bool { return d.agent.Bundle() != nil }); err != nil {
		return err
	}
	d.event("agent", "has joined with a join token and serves workloads at %s", d.socket)
	fill := stepTimeout + time.Duration(d.svids)*10*time.Millisecond
	if err := d.waitUntil(ctx, "the agent holds all SVIDs", fill, func() bool { return d.x509(d.old).Held == d.svids }); err != nil {
		return err
	}
	d.event("agent", "holds %d SVIDs: %d for the workloads, %d that are idle",
		d.svids, d.workloads, d.svids-d.workloads)
	for range d.workloads {
		if err := d.fleet.start(d.socket); err != nil {
			return err
		}
	}
	if err := d.waitUntil(ctx, "the workloads get their identities", stepTimeout, func() bool {
		return d.fleet.all(func(c workloadState) bool { return c.ID != "" && c.JWTKey != "" })
	}); err != nil {
		return err
	}
	d.event("workloads", "%d processes have an SVID and a JWT-SVID (a signed token) each", d.workloads)
	if err := d.fleet.call(); err != nil {
		return err
	}
	d.event("workloads", "call each other over mutual TLS, each with a new handshake every %v", callInterval)
	return d.pauseForReader(ctx)
}

// prepare publishes the new key.
func (d *demo) prepare(ctx context.Context, _ *slog.Logger) error {
	done, err := runbook.Prepare(ctx, d.backend)
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	for _, k := range d.server.Keysets().Status().Keysets {
		if k.ID == done.Keyset {
			d.new = k
		}
	}
	d.screen.step(1, "PREPARE",
		"A new key is published, so that everyone trusts it. It does not sign.")
	d.event("operator", "keysetctl prepare\n%s", done)
	if err := d.waitUntil(ctx, "the agent learns of the new key", d.refresh+stepTimeout, func() bool {
		_, ok := d.published(d.new)
		return ok
	}); err != nil {
		return err
	}
	d.event("agent", "has the new key (keyset %s); it refreshes the trust bundle every %v", d.new.ID, d.refresh)
	if err := d.waitUntil(ctx, "all workloads trust the new key", stepTimeout, func() bool {
		return d.fleet.all(func(c workloadState) bool { return slices.Contains(c.Trusts, d.new.X509AuthorityID) })
	}); err != nil {
		return err
	}
	d.event("workloads", "all %d trust both keys", d.workloads)
	return d.pauseForReader(ctx)
}

// activate lets the new key sign.
func (d *demo) activate(ctx context.Context, _ *slog.Logger) error {
	done, err := runbook.Activate(ctx, d.backend, d.new.ID)
	if err != nil {
		return fmt.Errorf("activate: %w", err)
	}
	d.screen.step(2, "ACTIVATE",
		"The new key signs every new SVID. SVIDs of the old key stay valid and in use.")
	d.event("operator", "keysetctl activate %s\n%s", d.new.ID, done)
	return d.pauseForReader(ctx)
}

// taint taints the old key and waits until nothing on the node depends on it.
func (d *demo) taint(ctx context.Context, _ *slog.Logger) error {
	d.atTaint = d.fleet.total()
	d.tainted = time.Now()
	done, err := runbook.Taint(ctx, d.backend, d.old.ID)
	if err != nil {
		return fmt.Errorf("taint: %w", err)
	}
	d.delay = d.agent.TaintDelay(d.old.X509AuthorityID)
	d.screen.step(3, "TAINT",
		"The old key is tainted: agents replace the X.509-SVIDs that it signed, at a limited rate. "+
			"They stay valid until then.")
	d.event("operator", "keysetctl taint %s\n%s", d.old.ID, done)
	d.screen.step(4, "WAIT",
		"The agent replaces the SVIDs of the old key and reports to the server when nothing depends on it.")
	limit := d.refresh + d.maxDelay + time.Duration(d.svids)*75*time.Millisecond + stepTimeout
	err = d.waitUntil(ctx, "every SVID of the old key is replaced", limit, d.waveEnded)
	d.renewals = d.recorder.since(d.tainted)
	if err != nil {
		return err
	}
	d.event("agent", "settled %.1f s after the taint: no SVID of the old key held, no renewal waiting, "+
		"no stream without the replacement. On this node the old key is safe to remove",
		d.settled.Sub(d.tainted).Seconds())
	// The last replacement is sent, but may not be received yet.
	received := d.waitUntil(ctx, "the workloads confirm", 5*time.Second, func() bool { return d.fleet.all(d.usesNewKey) })
	d.confirmed = received == nil && len(d.renewals) > d.svids
	if received != nil && !errors.As(received, new(*stuckError)) {
		return received
	}
	if received == nil && d.inUse.IsZero() {
		d.inUse = time.Now()
	}
	d.jwtNotBefore = d.agent.State().JWTExpiry[d.old.JWTKeyID]
	d.event("agent", "a taint does not replace JWT-SVIDs: those of the old key are valid until %s",
		d.jwtNotBefore.Local().Format("Jan 2 15:04"))
	return d.pauseForReader(ctx)
}

// waveEnded records the events since the taint and reports whether the agent says that
// nothing depends on the old key.
func (d *demo) waveEnded() bool {
	now := time.Now()
	if d.seen.IsZero() {
		since, ok := d.taintSeen()
		if !ok {
			return false
		}
		d.seen = since
		d.event("agent", "has seen the taint and waits %.1f s, a random delay below %v, "+
			"so that the nodes of a fleet do not all call the server at once",
			d.delay.Seconds(), d.maxDelay)
	}
	if d.firstRenewal.IsZero() {
		renewals := d.recorder.since(d.tainted)
		if len(renewals) == 0 {
			return false
		}
		d.firstRenewal = renewals[0].at
		d.event("agent", "renews the agent SVID first, then SVIDs in use, then idle ones, at most %d per second", wave.DefaultRate)
	}
	if d.inUse.IsZero() && d.fleet.all(d.usesNewKey) {
		d.inUse = now
		d.event("workloads", "all %d have SVIDs of the new key and use them", d.workloads)
	}
	if d.x509(d.old).State != metrics.StateSettled {
		return false
	}
	d.settled = now
	return true
}

// remove waits until the server agrees and removes the old key.
func (d *demo) remove(ctx context.Context, _ *slog.Logger) error {
	// The server decides from the SVIDs that it signed and the agent's reports.
	safe, err := runbook.Wait(ctx, d.backend, d.old.ID, runbook.WaitOptions{Timeout: stepTimeout, Interval: 100 * time.Millisecond})
	if errors.As(err, new(*runbook.NotSafeError)) {
		return &stuckError{step: "the server agrees that the old key is safe to remove", after: stepTimeout}
	} else if err != nil {
		return err
	}
	d.agreed = time.Now()
	d.event("operator", "keysetctl wait %s\n%s", d.old.ID, safe)
	d.atRemove = d.fleet.total()
	done, err := runbook.Remove(ctx, d.backend, d.old.ID, false, time.Now())
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	d.removed = time.Now()
	d.screen.step(5, "REMOVE",
		"The old key is deleted, and its JWT-SVIDs are no longer valid. An operator can wait for their "+
			"expiry first (--for all). The demo does not, to show how the agent replaces them.")
	d.event("operator", "keysetctl remove %s\n%s", d.old.ID, done)
	if err := d.waitUntil(ctx, "the agent drops the old key", d.refresh+stepTimeout, func() bool {
		_, ok := d.published(d.old)
		return !ok
	}); err != nil {
		return err
	}
	d.event("agent", "has dropped the old key and its JWT-SVIDs")
	if err := d.waitUntil(ctx, "all workloads trust only the new key and get JWT-SVIDs of it", stepTimeout, func() bool {
		return d.fleet.all(func(c workloadState) bool {
			return !slices.Contains(c.Trusts, d.old.X509AuthorityID) && c.JWTKey == d.new.JWTKeyID
		})
	}); err != nil {
		return err
	}
	d.jwtReplaced = time.Now()
	d.event("workloads", "all %d trust only the new key and have JWT-SVIDs of it", d.workloads)
	return d.pauseForReader(ctx)
}

// finish lets the calls in flight end, so that none counts as failed.
func (d *demo) finish(ctx context.Context, _ *slog.Logger) error {
	if err := d.fleet.stopCalls(); err != nil {
		return err
	}
	return d.waitUntil(ctx, "the last calls end", callTimeout+stepTimeout, func() bool {
		return d.fleet.all(func(c workloadState) bool { return c.Stopped })
	})
}

// pauseForReader waits for the pause between two steps.
func (d *demo) pauseForReader(ctx context.Context) error {
	end := time.Now().Add(d.pause)
	return d.waitUntil(ctx, "pause", d.pause+stepTimeout, func() bool { return time.Now().After(end) })
}

// waitUntil polls ok and shows progress.
func (d *demo) waitUntil(ctx context.Context, step string, limit time.Duration, ok func() bool) error {
	deadline := time.Now().Add(limit)
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			return &stuckError{step: step, after: limit}
		}
		d.showProgress()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
	return nil
}

// event writes lines of the timeline.
func (d *demo) event(who, format string, args ...any) {
	d.screen.event(who, strings.Split(cli.PrintableLines(fmt.Sprintf(format, args...)), "\n")...)
}

func (d *demo) showProgress() {
	if d.agent == nil {
		return
	}
	renewed := 0
	if d.new.ID != "" {
		renewed = d.x509(d.new).Held
	}
	t := d.fleet.total()
	d.screen.progress(fmt.Sprintf("SVIDs of the new key %s %d/%d  calls %d, failed %d  longest without SVID %v",
		bar(renewed, d.svids), renewed, d.svids, t.Calls, t.Failures, t.LongestGap.Round(time.Millisecond)))
}

// usesNewKey reports whether a workload's SVID was signed by the new key.
func (d *demo) usesNewKey(c workloadState) bool { return c.Authority == d.new.X509AuthorityID }

// x509 returns the agent's figures for a keyset's X.509 key.
func (d *demo) x509(k keyset.Keyset) metrics.Authority {
	for _, a := range d.agent.State().Authorities {
		if a.Type == metrics.TypeX509 && a.ID == k.X509AuthorityID {
			return a
		}
	}
	return metrics.Authority{}
}

// published returns a keyset's X.509 authority from the agent's trust bundle.
func (d *demo) published(k keyset.Keyset) (bundle.X509Authority, bool) {
	for _, a := range d.agent.Bundle().Own.X509() {
		if a.ID == k.X509AuthorityID {
			return a, true
		}
	}
	return bundle.X509Authority{}, false
}

// taintSeen returns when the agent saw the old key's taint.
func (d *demo) taintSeen() (time.Time, bool) {
	a, ok := d.published(d.old)
	return a.TaintedSince, ok && a.Tainted
}
