package runbook

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/clock"
)

// notKnown is what stands for a figure that is not to be had.
const notKnown = "not known"

// List prints the deployment's keysets, two rows each, in columns that fit 120.
// The first five are those of the runbook; then the live SVIDs of the key (of
// a JWT key: for how long there will be any) and whether removing it takes a
// valid one from anybody. What is not known says so. Nothing follows the table:
// scripts cut it; what else there is to say is in [Remarks].
func List(w io.Writer, s Status, now time.Time) error {
	if err := cli.Printf(w, "Deployment: %s\nSigning Keys:\n", cli.Printable(s.Deployment)); err != nil {
		return err
	}
	table := cli.NewTable(w)
	_, _ = fmt.Fprintln(table, "Type\tKeyset ID\tIssued At\tExpires At\tState\tLive SVIDs\tSafe to remove")
	row := func(k Keyset, typ, state, live, safe string) {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", typ, cli.Printable(k.ID), stamp(k.IssuedAt), stamp(k.ExpiresAt), state, live, safe)
	}
	for _, k := range s.Keysets {
		if k.X509AuthorityID == "" {
			row(k, "X.509", "Missing", "-", "-")
		} else {
			row(k, "X.509", string(k.State), k.liveX509(), k.safeCell(X509))
		}
		if k.JWTKeyID == "" {
			row(k, "JWT", "Missing", "-", "-")
		} else {
			row(k, "JWT", string(k.state(JWT)), k.liveJWT(now), k.safeCell(JWT))
		}
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// Remarks says in a line each what is out of the ordinary: agents behind,
// figures that are not known and why, keys that are in different states, a clock that is
// in doubt, what automatic rotation is about to do.
func Remarks(s Status) []string {
	var lines []string
	switch {
	case s.Agents < 0 || s.AgentsBehind < 0:
		lines = append(lines, notKnownBehind+".")
	case s.AgentsBehind > 0:
		lines = append(lines, behind(s)+".")
	}
	for _, id := range s.Duplicated {
		lines = append(lines, fmt.Sprintf("Two processes use the identity of agent %s, such as those of a node and its clone. Evict it, and attest each node with a join token of its own.", id))
	}
	unknown := make(map[string][]string)
	var reasons []string
	for _, k := range s.Keysets {
		if k.JWTState != "" && k.JWTState != k.State {
			lines = append(lines, apart(k)+".")
		}
		if k.Unknown == "" {
			continue
		}
		if unknown[k.Unknown] == nil {
			reasons = append(reasons, k.Unknown)
		}
		unknown[k.Unknown] = append(unknown[k.Unknown], k.ID)
	}
	slices.Sort(reasons)
	for _, why := range reasons {
		lines = append(lines, fmt.Sprintf("The figures of %s are not known: %s.", and(unknown[why]), why))
	}
	if s.ClockDoubt != "" {
		lines = append(lines, "The server's clock is in doubt: "+s.ClockDoubt+".")
	}
	if s.Automatic != "" {
		lines = append(lines, "Automatic rotation: "+s.Automatic+".")
	}
	for i, line := range lines {
		lines[i] = cli.Printable(line)
	}
	return lines
}

const notKnownBehind = "It is not known which agents have applied the trust bundle"

// behind says how many agents have not applied the bundle.
func behind(s Status) string {
	return fmt.Sprintf("%d of %s %s not applied trust bundle %d yet",
		s.AgentsBehind, counted(s.Agents, "agent"), have(s.AgentsBehind), s.Sequence)
}

// apart says that the two keys of a keyset were moved one without the other.
func apart(k Keyset) string {
	return fmt.Sprintf("The X.509 key of %s is %s and its JWT key is %s", k.ID, k.State, k.JWTState)
}

// state is that of the X.509 or of the JWT key.
func (k Keyset) state(f For) State {
	if f == JWT && k.JWTState != "" {
		return k.JWTState
	}
	return k.State
}

// safe reports whether the key, or both, can be removed. What is not known is
// never safe; nothing hangs on a key that is missing.
func (k Keyset) safe(f For) bool {
	known := k.Unknown == ""
	x509 := k.X509AuthorityID == "" || (k.X509Safe && known && k.state(X509) == Tainted)
	jwt := k.JWTKeyID == "" || (k.JWTSafe && known && k.state(JWT) == Tainted)
	switch f {
	case X509:
		return x509
	case JWT:
		return jwt
	}
	return x509 && jwt
}

func (k Keyset) safeCell(f For) string {
	switch {
	case k.state(f) != Tainted:
		return "-" // nobody may remove it
	case k.Unknown != "":
		return notKnown
	case k.safe(f):
		return "yes"
	}
	return "no"
}

func (k Keyset) liveX509() string {
	if k.Unknown != "" || k.X509SVIDs < 0 {
		return notKnown
	}
	return strconv.Itoa(k.X509SVIDs)
}

func (k Keyset) liveJWT(now time.Time) string {
	switch {
	case k.JWTExpiry.After(now):
		return "for " + short(k.JWTExpiry.Sub(now))
	case k.Unknown != "", k.JWTExpiry.IsZero() && k.state(JWT) == Tainted && !k.JWTSafe:
		return notKnown // and with none it would be safe
	}
	return "none"
}

// jwtRemark says until when JWT-SVIDs of the keyset are valid; empty when none
// are.
func (k Keyset) jwtRemark(now time.Time) string {
	switch {
	case k.JWTExpiry.After(now):
		return fmt.Sprintf("JWT-SVIDs that %s signed are valid until %s; relying parties reject them as soon as they fetch the trust bundle without it.",
			k.ID, when(k.JWTExpiry, now))
	case k.jwtJustExpired(now) && !k.JWTSafe:
		return fmt.Sprintf("JWT-SVIDs that %s signed expired %s; relying parties whose clocks are late may take them for valid.", k.ID, when(k.JWTExpiry, now))
	case k.JWTKeyID != "" && (k.Unknown != "" || !k.JWTSafe):
		return fmt.Sprintf("Whether JWT-SVIDs that %s signed are still valid is not known; relying parties reject them as soon as they fetch the trust bundle without it.", k.ID)
	}
	return ""
}

// jwtJustExpired reports whether the last known JWT-SVID of the keyset has expired,
// but not by all clocks.
func (k Keyset) jwtJustExpired(now time.Time) bool {
	return !k.JWTExpiry.After(now) && clock.Over(k.JWTExpiry).After(now)
}

func find(s Status, id string) (Keyset, bool) {
	for _, k := range s.Keysets {
		if k.ID == id {
			return k, true
		}
	}
	return Keyset{}, false
}
