package spire

import (
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// stage returns a server with its keys at a stage of a rotation: before (0), prepared (1),
// activated (2), tainted (3), removed (4), or replaced by a server with other keys (R). A
// is its former key, N its next, F that of the replacement.
func stage(name byte, i int) serverState {
	begin := time.Date(2026, 11, 1, 0, i, 0, 0, time.UTC)
	key := func(letter string, at slot, issued time.Time) authority {
		return authority{id: letter, slot: at, published: true, issued: issued, expires: issued.Add(90 * time.Hour)}
	}
	pairOf := func(letter string, at slot, issued time.Time) pair {
		return pair{key(letter, at, issued), key(strings.ToLower(letter), at, issued)}
	}
	former := func(at slot) pair { return pairOf("A", at, begin) }
	next := func(at slot) pair { return pairOf("N", at, begin.Add(48*time.Hour)) }
	var s serverState
	switch name {
	case '0':
		s.keys = []pair{former(active)}
	case '1':
		s.keys = []pair{former(active), next(prepared)}
	case '2':
		s.keys = []pair{former(old), next(active)}
	case '3':
		p := former(old)
		p.x509.tainted, p.jwt.tainted = true, true
		s.keys = []pair{p, next(active)}
	case '4':
		s.keys = []pair{next(active)}
		p := former(old)
		p.x509.published, p.jwt.published = false, false
		s.x509Slots.next, s.jwtSlots.next = p.x509, p.jwt
	case 'R':
		s.keys = []pair{pairOf("F", active, begin.Add(49*time.Hour))}
	}
	return s
}

// TestKeysets has two servers at each two stages, in both orders. A revoked key is in
// parentheses, a dash means that the server has none.
func TestKeysets(t *testing.T) {
	t.Parallel()
	for stages, want := range map[string]struct {
		keysets string // the keys of the first and of the second server
		next    runbook.Action
	}{
		"00": {"AA", runbook.ActNone},
		"01": {"AA -N", runbook.ActPrepare},
		"02": {"AA -N", runbook.ActPrepare},
		"03": {"AA -N", runbook.ActPrepare},
		"04": {"AN", runbook.ActNone}, // a rotation of one server that is over
		"0R": {"AF", runbook.ActNone},
		"11": {"AA NN", runbook.ActActivate},
		"12": {"AA NN", runbook.ActActivate},
		"13": {"AA NN", runbook.ActActivate},
		"14": {"A(A) NN", runbook.ActActivate},
		"1R": {"A- NF", runbook.ActActivate},
		"22": {"AA NN", runbook.ActTaint},
		"23": {"AA NN", runbook.ActTaint},
		"24": {"A(A) NN", runbook.ActTaint},
		"2R": {"A- NF", runbook.ActTaint},
		"33": {"AA NN", runbook.ActRemove},
		"34": {"A(A) NN", runbook.ActRemove},
		"3R": {"A- NF", runbook.ActRemove},
		"44": {"NN", runbook.ActNone},
		"4R": {"NF", runbook.ActNone},
		"RR": {"FF", runbook.ActNone},
	} {
		for _, reversed := range []bool{false, true} {
			s := clusterState{answered: []*server{{name: "first"}, {name: "second"}}}
			for i := range stages {
				j := i
				if reversed {
					j = len(stages) - 1 - i
				}
				s.servers = append(s.servers, stage(stages[j], j))
			}
			s.keysets = keysets(s.servers)
			var got []string
			var status runbook.Status
			for _, k := range s.keysets {
				text := ""
				for i := range k {
					p := k[i]
					if reversed {
						p = k[len(k)-1-i]
					}
					switch {
					case p == pair{}:
						text += "-"
					case !p.exists():
						text += "(" + p.x509.id + ")"
					default:
						text += p.x509.id
					}
				}
				got = append(got, text)
				status.Keysets = append(status.Keysets, s.toRunbook(k))
			}
			if text := strings.Join(got, " "); text != want.keysets {
				t.Errorf("stages %s, reversed %v: keysets %q, want %q", stages, reversed, text, want.keysets)
			}
			step, err := runbook.Next(status, "", time.Date(2026, 11, 3, 2, 0, 0, 0, time.UTC))
			if err != nil || step.Action != want.next {
				t.Errorf("stages %s, reversed %v: next step %v, %v, want %q", stages, reversed, step, err, want.next)
			}
		}
	}
}

// TestHalfDoneAtOneServer has a server at which only one key has made the step, beside
// servers before and after it.
func TestHalfDoneAtOneServer(t *testing.T) {
	t.Parallel()
	half := func(from, to byte) serverState {
		s, after := stage(from, 0), stage(to, 0)
		if from == '0' {
			s.keys = append(s.keys, pair{x509: after.keys[1].x509})
			return s
		}
		for i := range s.keys {
			s.keys[i].x509 = after.keys[i].x509
		}
		return s
	}
	for _, tt := range []struct {
		from, to byte
		want     runbook.Action
	}{{'0', '1', runbook.ActPrepare}, {'1', '2', runbook.ActActivate}, {'2', '3', runbook.ActTaint}} {
		for _, other := range []byte{tt.from, tt.to} {
			s := clusterState{answered: []*server{{name: "first"}, {name: "second"}}, servers: []serverState{half(tt.from, tt.to), stage(other, 1)}}
			s.keysets = keysets(s.servers)
			var status runbook.Status
			for _, k := range s.keysets {
				status.Keysets = append(status.Keysets, s.toRunbook(k))
			}
			step, err := runbook.Next(status, "", time.Date(2026, 11, 3, 2, 0, 0, 0, time.UTC))
			if err != nil || step.Action != tt.want {
				t.Errorf("from %c to %c beside %c: %v, %v, want %s", tt.from, tt.to, other, step, err, tt.want)
			}
		}
	}
}

// TestUnownedOfTheNewestBundle: an authority that one server does not know yet is not of a
// server that is not given.
func TestUnownedOfTheNewestBundle(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	a := authority{id: "a", published: true, expires: now.Add(time.Hour)}
	gone := authority{id: "gone", published: true, expires: now.Add(time.Hour)}
	over := authority{id: "over", published: true, expires: now}
	late := serverState{sequence: 1, x509: []authority{a, gone}, x509Slots: slots{active: a}}
	newest := serverState{sequence: 2, x509: []authority{a, over}, x509Slots: slots{active: a}}
	if got := unowned([]serverState{late, newest}, now); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	if got := unowned([]serverState{late}, now); len(got) != 1 || got[0].ID != "gone" {
		t.Errorf("%+v", got)
	}
}
