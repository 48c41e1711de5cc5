package runbook_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/test/runbooktest"
)

// followed is a server whose bundle other trust domains follow.
type followed struct {
	*runbooktest.Server
	wait time.Duration
	down func() bool // no answer
}

func (f *followed) Status(ctx context.Context) (runbook.Status, error) {
	if f.down != nil && f.down() {
		return runbook.Status{}, &runbook.UnreachableError{Servers: 2, Err: errors.New("the second is down")}
	}
	s, err := f.Server.Status(ctx)
	s.FollowersWait = f.wait
	return s, err
}

func (f *followed) Prepare(ctx context.Context) (runbook.Keyset, error) {
	if f.down != nil && f.down() {
		return runbook.Keyset{}, &runbook.UnreachableError{Servers: 2, Err: errors.New("the second is down")}
	}
	return f.Server.Prepare(ctx)
}

func TestFollowersWait(t *testing.T) {
	t.Parallel()
	for hint, want := range map[time.Duration]time.Duration{
		0: 7 * time.Minute, time.Second: 3 * time.Minute, time.Minute: 3 * time.Minute, 5 * time.Minute: 7 * time.Minute, time.Hour: 62 * time.Minute,
	} {
		if got := runbook.FollowersWait(hint); got != want {
			t.Errorf("hint %v: %v, want %v", hint, got, want)
		}
	}
}

// TestRotateWaitsForFollowers: a keyset is not activated before relying parties of other
// trust domains have it. The time of an earlier run counts.
func TestRotateWaitsForFollowers(t *testing.T) {
	t.Parallel()
	const wait = 7 * time.Minute
	for name, tt := range map[string]struct {
		server, option time.Duration
		age            time.Duration // of a keyset that is prepared already; 0: none
		want           time.Duration
	}{
		"none follow":         {0, 0, 0, 0},
		"from prepare on":     {wait, 0, 0, wait},
		"prepared before":     {wait, 0, 5 * time.Minute, 2 * time.Minute},
		"prepared long ago":   {wait, 0, time.Hour, 0},
		"no wait":             {wait, -1, 0, 0},
		"a wait of one's own": {0, time.Hour, 0, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := &followed{Server: runbooktest.NewServer(t), wait: tt.server}
				if tt.age > 0 {
					if _, err := s.Deployment.Prepare(t.Context()); err != nil {
						t.Fatal(err)
					}
					time.Sleep(tt.age)
				}
				begun := time.Now()
				var activated time.Duration
				var out bytes.Buffer
				_, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{
					FollowersWait: tt.option, Wait: runbook.WaitOptions{Progress: &runbook.Screen{W: &out}},
					Report: func(r runbook.StepResult) {
						if r.Done == "activated" {
							activated = time.Since(begun)
						}
					},
				})
				if err != nil || activated < tt.want || activated > tt.want+runbook.DefaultInterval {
					t.Errorf("activated after %v, %v, want %v", activated, err, tt.want)
				}
				if shown := strings.Contains(out.String(), "relying parties of other trust domains may lack"); shown != (tt.want > 0) {
					t.Errorf("shown:\n%s", out.String())
				}
			})
		})
	}
}

// TestRotateWithoutTimeForFollowers ends by its timeout, and the next run continues.
func TestRotateWithoutTimeForFollowers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &followed{Server: runbooktest.NewServer(t), wait: 7 * time.Minute}
		o := runbook.RotateOptions{Wait: runbook.WaitOptions{Timeout: 5 * time.Minute}}
		_, err := runbook.Rotate(t.Context(), s, o)
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !strings.Contains(err.Error(), "--followers-wait 0") {
			t.Fatalf("the first run: %v", err)
		}
		status, err := s.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if lines := strings.Join(runbook.Remarks(status, time.Now()), "\n"); !strings.Contains(lines, "their relying parties may lack keyset "+status.Keysets[1].ID+" until ") {
			t.Errorf("remarks:\n%s", lines)
		}
		begun := time.Now()
		r, err := runbook.Rotate(t.Context(), s, o)
		if took := time.Since(begun); err != nil || !r.Complete || took > 3*time.Minute {
			t.Errorf("the second run: %+v, %v after %v", r, err, took)
		}
	})
}

// TestRotateWhileAServerIsDown: nothing is changed while a server of a cluster is down, and
// the rotation goes on when it is back. The first look fails at once: the address may be
// wrong.
func TestRotateWhileAServerIsDown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		looks := 0
		s := &followed{Server: runbooktest.NewServer(t), down: func() bool {
			looks++
			return looks > 1 && time.Since(begun) < time.Minute
		}}
		r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{})
		if took := time.Since(begun); err != nil || !r.Complete || len(r.Steps) != 4 || took < time.Minute || took > 2*time.Minute {
			t.Errorf("%+v, %v after %v", r, err, took)
		}
		s.down = func() bool { return true }
		if _, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{}); err == nil {
			t.Error("the first look succeeded")
		}
	})
}
