package runbook

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// minFollowersWait is the least wait for relying parties of other trust domains, and
// followersPropagation what it allows for beside their poll: a cache of the bundle
// endpoint and an agent that asks its server once a minute.
const (
	minFollowersWait     = 3 * time.Minute
	followersPropagation = 2 * time.Minute
)

// FollowersWait returns how long after its publication relying parties of other trust
// domains may lack a key. They ask at least as often as the refresh hint of the bundle
// endpoint says, at most once a minute, and every five minutes if it is zero (SPIFFE
// Federation, section 4.1). A SPIRE server asks four times as often.
func FollowersWait(refreshHint time.Duration) time.Duration {
	if refreshHint <= 0 {
		refreshHint = 5 * time.Minute
	}
	return max(max(refreshHint, time.Minute)+followersPropagation, minFollowersWait)
}

// trustedByFollowers returns when relying parties of other trust domains have a keyset. It
// is zero if none follow or if that is not known.
func trustedByFollowers(k Keyset, wait time.Duration) time.Time {
	if wait <= 0 || k.IssuedAt.IsZero() {
		return time.Time{}
	}
	return k.IssuedAt.Add(wait)
}

// awaitFollowers waits until relying parties of other trust domains have the keyset that is
// to be activated. prepared is when this run prepared it, or zero.
func awaitFollowers(ctx context.Context, b Backend, step Step, prepared time.Time, o RotateOptions) error {
	begun := o.Wait.Now()
	err := await(ctx, o.Wait, step.Keyset, func(ctx context.Context) (bool, *display, error) {
		s, err := b.Status(ctx)
		if err != nil {
			return false, nil, err
		}
		wait := o.FollowersWait
		if wait == 0 {
			wait = s.FollowersWait
		}
		k, found := find(s, step.Keyset)
		if wait <= 0 || !found || k.leastProgress() != Prepared || k.SteppedDown || anyActive(k) {
			return true, nil, nil
		}
		// The time of this run counts too, because the server's clock may be late.
		until := trustedByFollowers(k, wait)
		if own := prepared.Add(wait); !prepared.IsZero() && own.After(until) {
			until = own
		} else if until.IsZero() {
			until = begun.Add(wait)
		}
		now := o.Wait.Now()
		// A clock that differs must not make the wait longer.
		left := min(until.Sub(now), begun.Add(wait).Sub(now))
		if left <= 0 {
			return true, nil, nil
		}
		line := fmt.Sprintf("relying parties of other trust domains may lack %s for %s more", step.Keyset, formatDuration(left))
		return false, &display{
			step: step.Action, title: fmt.Sprintf("%s %s, when other trust domains have it", step.Action, step.Keyset), line: line, begun: begun, status: s,
			what: "seconds until they have asked for the bundle", left: int(left / time.Second), total: int(wait / time.Second),
			notes: []string{fmt.Sprintf("to continue without them: interrupt, then keysetctl rotate --followers-wait 0 (they ask within %s)", formatDuration(wait))},
		}, nil
	})
	if errors.Is(err, errTimeout) {
		return &NotSafeError{Keyset: step.Keyset, Message: fmt.Sprintf(
			"it is not safe to %s %s after %s: relying parties of other trust domains may lack it\nRun keysetctl rotate again to wait longer, or with --followers-wait 0 to continue without them.",
			step.Action, step.Keyset, formatDuration(o.Wait.Timeout))}
	}
	if err != nil {
		return fmt.Errorf("wait for other trust domains before %s %s: %w", step.Action, step.Keyset, err)
	}
	return nil
}

// anyActive reports whether a server of a cluster signs with the keyset already.
func anyActive(k Keyset) bool {
	for _, m := range k.Members {
		if m.State == Active {
			return true
		}
	}
	return false
}
