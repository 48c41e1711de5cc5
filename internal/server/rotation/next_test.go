package rotation_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
)

// at is a day of the test, counted from start.
func at(days float64) time.Time { return start.Add(time.Duration(days * float64(day))) }

// ks returns a keyset that was issued on a day, with a lifetime of 90 days.
func ks(id string, state keyset.State, issued float64) keyset.Keyset {
	return keyset.Keyset{ID: id, State: state, IssuedAt: at(issued), ExpiresAt: at(issued + 90), ValidFrom: at(issued)}
}

// upSince is a clock that has been right since then.
type upSince struct{ now, since time.Time }

func (c upSince) PastFor(t time.Time) time.Duration {
	if t.Before(c.since) {
		t = c.since
	}
	return min(c.now.Sub(t), day)
}

func (c upSince) AtLeast() time.Time { return c.now }

func replaced(k keyset.Keyset, days float64, by string) keyset.Keyset {
	k.SteppedDownAt, k.SteppedDownBy = at(days), by
	return k
}

func shorter(k keyset.Keyset, expires float64) keyset.Keyset {
	k.ExpiresAt = at(expires)
	return k
}

const (
	prepared = keyset.Prepared
	active   = keyset.Active
	tainted  = keyset.Tainted
)

// TestNext has one row for each rule, with the default thresholds of 14 days, one day and
// one day. The active keyset a is issued on day 0 unless the row says otherwise.
func TestNext(t *testing.T) {
	t.Parallel()
	const minutes = 1.0 / 24 / 60
	a := ks("a", active, 0)
	behind := facts{behind: func() int { return 3 }}
	holds := func(h rotation.Holding) facts {
		return facts{holding: func(keyset.Keyset) rotation.Holding { return h }}
	}
	unused := facts{
		behind: func() int { t.Error("Behind called without need"); return 0 },
		holding: func(keyset.Keyset) rotation.Holding {
			t.Error("Holding called without need")
			return rotation.Holding{}
		},
	}
	for name, row := range map[string]struct {
		now      float64
		keysets  []keyset.Keyset
		facts    facts
		want     string
		at       float64
		waitsFor string
	}{
		"long before":          {10, []keyset.Keyset{a}, unused, "prepare", 76, ""},
		"at the threshold":     {76, []keyset.Keyset{a}, unused, "prepare", 76, ""},
		"prepared, too young":  {76.5, []keyset.Keyset{a, ks("b", prepared, 76)}, unused, "activate b", 77, ""},
		"prepared, old enough": {77, []keyset.Keyset{a, ks("b", prepared, 76)}, facts{}, "activate b", 77, ""},
		"agents are behind":    {77, []keyset.Keyset{a, ks("b", prepared, 76)}, behind, "activate b", 83.5, "3 agents that have not applied the trust bundle"},
		"one agent is behind":  {77, []keyset.Keyset{a, ks("b", prepared, 76)}, facts{behind: func() int { return 1 }}, "activate b", 83.5, "1 agent that has not applied the trust bundle"},
		"behind for too long":  {83.5, []keyset.Keyset{a, ks("b", prepared, 76)}, behind, "activate b", 77, ""},

		"by an operator, in advance":   {40, []keyset.Keyset{a, ks("b", prepared, 30)}, unused, "activate b", 77, ""},
		"by an operator, too long ago": {40, []keyset.Keyset{a, shorter(ks("b", prepared, 13), 103)}, unused, "prepare", 76, ""},
		"two are prepared":             {77, []keyset.Keyset{a, ks("b", prepared, 70), ks("c", prepared, 71)}, facts{}, "activate b", 77, ""},
		"the first is too short":       {77, []keyset.Keyset{a, shorter(ks("b", prepared, 70), 100), ks("c", prepared, 71)}, facts{}, "activate c", 77, ""},
		"one that has signed":          {76, []keyset.Keyset{a, replaced(ks("b", prepared, 50), 60, "alice")}, unused, "prepare", 76, ""},

		// Late: after half of the remaining time, and half of the rest.
		"prepared late":            {89.25, []keyset.Keyset{a, ks("b", prepared, 89)}, unused, "activate b", 89.5, ""},
		"late and agents behind":   {89.5, []keyset.Keyset{a, ks("b", prepared, 89)}, behind, "activate b", 89.75, "3 agents that have not applied the trust bundle"},
		"late and over the limit":  {89.75, []keyset.Keyset{a, ks("b", prepared, 89)}, behind, "activate b", 89.5, ""},
		"expired, none prepared":   {90, []keyset.Keyset{a}, unused, "prepare", 76, ""},
		"expired, prepared then":   {95, []keyset.Keyset{a, ks("b", prepared, 95)}, behind, "activate b", 90, ""},
		"expired, short successor": {95, []keyset.Keyset{a, shorter(ks("b", prepared, 20), 96)}, behind, "activate b", 77, ""},
		"all expired":              {200, []keyset.Keyset{a, ks("b", prepared, 20)}, unused, "prepare", 76, ""},
		"expired, clock set back":  {95, []keyset.Keyset{a, ks("b", prepared, 110)}, unused, "prepare", 76, ""},
		"not valid yet":            {-400, []keyset.Keyset{a}, unused, "prepare", -414, ""},
		"not valid yet, prepared":  {-400, []keyset.Keyset{a, ks("b", prepared, -400)}, behind, "activate b", -400, ""},

		"replaced, not yet to be tainted": {77.5, []keyset.Keyset{replaced(ks("o", prepared, 0), 77, "scheduler"), ks("a", active, 76)}, unused, "taint o", 78, ""},
		"to be tainted":                   {78, []keyset.Keyset{replaced(ks("o", prepared, 0), 77, "scheduler"), ks("a", active, 76)}, unused, "taint o", 78, ""},
		"tainted and safe":                {78, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)}, facts{}, "remove o", 78, ""},
		"X.509-SVIDs are in use": {79, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{Agents: 4, JWTSafe: true}), "remove o", 90 + 5*minutes, "X.509-SVIDs of 4 agents"},
		"X.509-SVIDs of one agent are in use": {79, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{Agents: 1, JWTSafe: true}), "remove o", 90 + 5*minutes, "X.509-SVIDs of 1 agent"},
		"X.509-SVIDs are being signed": {79, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{JWTSafe: true}), "remove o", 90 + 5*minutes, "X.509-SVIDs that are being signed"},
		"not known since a restore": {79, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{UnknownSince: at(75), Agents: 2}), "remove o", 90 + 5*minutes, "X.509-SVIDs that were signed after 2026-03-17 00:00:00 +0000 UTC and are not known since a restore"},
		"JWT-SVIDs are in use": {79, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{X509Safe: true, JWTExpiry: at(80)}), "remove o", 90 + 5*minutes, "JWT-SVIDs that are valid until 2026-03-22 00:00:00 +0000 UTC"},
		"JWT-SVIDs are not known": {79, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{X509Safe: true}), "remove o", 90 + 5*minutes, "JWT-SVIDs"},
		"expired, never settled": {91 + 5*minutes, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "scheduler"), ks("a", active, 76)},
			holds(rotation.Holding{Agents: 1, JWTSafe: true}), "remove o", 91 + 6*minutes, "X.509-SVIDs of 1 agent"},
		"expired, settled": {91 + 5*minutes, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "alice"), ks("a", active, 76)},
			facts{}, "remove o", 91 + 5*minutes, ""},

		"an operator's, replaced":           {80, []keyset.Keyset{replaced(ks("o", prepared, 0), 77, "alice"), ks("a", active, 76)}, unused, "taint o", 91 + 5*minutes, ""},
		"an operator's, tainted":            {80, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "alice"), ks("a", active, 76)}, unused, "remove o", 91 + 5*minutes, ""},
		"never active and tainted":          {80, []keyset.Keyset{ks("o", tainted, 0), ks("a", active, 76)}, unused, "remove o", 91 + 5*minutes, ""},
		"an operator's, expired":            {91, []keyset.Keyset{replaced(ks("o", prepared, 0), 77, "alice"), ks("a", active, 76)}, unused, "taint o", 91 + 5*minutes, ""},
		"an operator's, tainted, expired":   {91, []keyset.Keyset{replaced(ks("o", tainted, 0), 77, "alice"), ks("a", active, 76)}, unused, "remove o", 91 + 5*minutes, ""},
		"never active, expired":             {91, []keyset.Keyset{ks("o", prepared, 0), ks("a", active, 76)}, unused, "taint o", 91 + 5*minutes, ""},
		"succession goes before the rest":   {77, []keyset.Keyset{replaced(ks("o", tainted, -20), 60, "scheduler"), a}, facts{}, "prepare", 76, ""},
		"waiting steps block no others":     {77, []keyset.Keyset{replaced(ks("o", tainted, -12), 60, "scheduler"), a}, holds(rotation.Holding{}), "prepare", 76, ""},
		"removal while activation waits":    {77, []keyset.Keyset{replaced(ks("o", tainted, -12), 60, "scheduler"), a, ks("b", prepared, 76)}, facts{behind: behind.behind}, "remove o", 77, ""},
		"taint while activation is to come": {76.5, []keyset.Keyset{replaced(ks("o", prepared, -12), 60, "scheduler"), a, ks("b", prepared, 76)}, unused, "taint o", 61, ""},
	} {
		got := rotation.Next(at(row.now), upSince{at(row.now), at(row.now - 2)}, policy(t, rotation.Policy{}), row.keysets, row.facts)
		if got.String() != row.want || got.WaitsFor != row.waitsFor {
			t.Errorf("%s: %q waits for %q, want %q and %q", name, got, got.WaitsFor, row.want, row.waitsFor)
		}
		if d := got.At.Sub(at(row.at)).Abs(); d > time.Millisecond {
			t.Errorf("%s: at day %v, want %v", name, got.At.Sub(start).Hours()/24, row.at)
		}
		if due := row.at <= row.now+1e-9; got.Due(at(row.now).Add(time.Millisecond)) != due || (due && got.WaitsFor != "") || got.Why == "" {
			t.Errorf("%s: due is %v, want %v: %+v", name, !due, due, got)
		}
		off := policy(t, rotation.Policy{Mode: rotation.Off})
		if got := rotation.Next(at(row.now), upSince{at(row.now), start}, off, row.keysets, unused); got != (rotation.Step{}) || got.Due(at(row.now)) || got.String() != "" {
			t.Errorf("%s: mode off: %v", name, got)
		}
	}
}

// TestExpiredWaitsForUptime: a step for an expired keyset needs a day of uptime past the
// expiry.
func TestExpiredWaitsForUptime(t *testing.T) {
	t.Parallel()
	for _, state := range []keyset.State{prepared, tainted} {
		keysets := []keyset.Keyset{replaced(ks("o", state, 0), 77, "alice"), ks("a", active, 340)}
		for up, want := range map[float64]float64{0: 401, 0.5: 400.5, 1: 400, 3: 400} {
			got := rotation.Next(at(400), upSince{at(400), at(400 - up)}, policy(t, rotation.Policy{}), keysets, facts{})
			if !got.At.Equal(at(want)) || got.Keyset != "o" {
				t.Errorf("%v, up for %v days: %v at day %v, want %v", state, up, got, got.At.Sub(start).Hours()/24, want)
			}
		}
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	hour := time.Hour
	for _, row := range []struct {
		policy   rotation.Policy
		lifetime time.Duration
		want     rotation.Policy
		fields   string // of the errors
	}{
		{rotation.Policy{}, 90 * day, rotation.Policy{Mode: rotation.On, PreparationThreshold: 14 * day, ActivationThreshold: day, TaintThreshold: day}, ""},
		{rotation.Policy{Mode: rotation.Off}, hour, rotation.Policy{Mode: rotation.Off, PreparationThreshold: 560 * time.Second, ActivationThreshold: 40 * time.Second, TaintThreshold: 40 * time.Second}, ""},
		{rotation.Policy{PreparationThreshold: 45 * day, ActivationThreshold: 22 * day, TaintThreshold: 22 * day}, 90 * day,
			rotation.Policy{Mode: rotation.On, PreparationThreshold: 45 * day, ActivationThreshold: 22 * day, TaintThreshold: 22 * day}, ""},
		{rotation.Policy{Mode: "On"}, 90 * day, rotation.Policy{}, "mode"},
		{rotation.Policy{PreparationThreshold: 46 * day}, 90 * day, rotation.Policy{}, "preparation_threshold"},
		{rotation.Policy{PreparationThreshold: day}, 90 * day, rotation.Policy{}, "activation_threshold taint_threshold"},
		{rotation.Policy{ActivationThreshold: 8 * day}, 90 * day, rotation.Policy{}, "activation_threshold"},
		{rotation.Policy{TaintThreshold: -hour, ActivationThreshold: 1500 * time.Millisecond}, 90 * day, rotation.Policy{}, "activation_threshold taint_threshold"},
	} {
		got, err := row.policy.For(row.lifetime)
		var fields []string
		if joined, ok := err.(interface{ Unwrap() []error }); ok {
			for _, err := range joined.Unwrap() {
				var p *rotation.PolicyError
				if errors.As(err, &p) {
					fields = append(fields, p.Field)
				}
			}
		}
		if got != row.want || strings.Join(fields, " ") != row.fields {
			t.Errorf("%+v: %+v, %v", row.policy, got, err)
		}
	}
	_, err := rotation.Policy{PreparationThreshold: 14 * day, ActivationThreshold: day, TaintThreshold: day}.For(20 * day)
	if want := "rotation: preparation_threshold is 336h0m0s, more than half of a keyset's lifetime, 480h0m0s: give at most 240h0m0s"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
