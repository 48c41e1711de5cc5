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

// notKnown stands for an unknown figure.
const notKnown = "not known"

// List prints a table of the deployment's keysets, two rows each, at most 120
// columns wide. The last two columns are the SVIDs in use that the key signed (for
// a JWT key: how long they are valid) and whether its removal is safe. Nothing
// follows the table, because scripts cut it; see [Remarks].
func List(w io.Writer, s Status, now time.Time) error {
	if err := cli.Printf(w, "Deployment: %s\nSigning Keys:\n", cli.Printable(s.Deployment)); err != nil {
		return err
	}
	table := cli.NewTable(w)
	_, _ = fmt.Fprintln(table, "Type\tKeyset ID\tIssued At\tExpires At\tState\tLive SVIDs\tSafe to remove")
	row := func(k Keyset, typ, state, live, safe string) {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", typ, cli.Printable(k.ID), formatTime(k.IssuedAt), formatTime(k.ExpiresAt), state, live, safe)
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
	return cli.Flush(table)
}

// Remarks returns lines for everything unusual: agents behind, unknown figures,
// keys in different states, a doubtful clock. It adds the next step of automatic
// rotation.
func Remarks(s Status, now time.Time) []string {
	var lines []string
	switch {
	case s.Agents < 0 || s.AgentsBehind < 0:
		lines = append(lines, agentsBehindNotKnown+".")
	case s.AgentsBehind > 0:
		lines = append(lines, agentsBehind(s)+".")
		lines = append(lines, nameBehind(s, now)...)
	}
	for _, id := range s.Duplicated {
		lines = append(lines, fmt.Sprintf("Two processes use the identity of agent %s, as on a node and its clone. Evict the agent, and attest each node with a join token of its own.", id))
	}
	unknown := make(map[string][]string)
	var reasons []string
	for _, k := range s.Keysets {
		if k.JWTState != "" && k.JWTState != k.State {
			lines = append(lines, keyStatesDiffer(k)+".")
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
		lines = append(lines, fmt.Sprintf("The figures of %s are not known: %s.", joinWithAnd(unknown[why]), why))
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

const agentsBehindNotKnown = "It is not known which agents have applied the trust bundle"

func agentsBehind(s Status) string {
	return fmt.Sprintf("%d of %s %s not applied trust bundle %d yet",
		s.AgentsBehind, quantity(s.Agents, "agent"), hasOrHave(s.AgentsBehind), s.Sequence)
}

// keyStatesDiffer describes a keyset with keys in different states.
func keyStatesDiffer(k Keyset) string {
	return fmt.Sprintf("The X.509 key of %s is %s and its JWT key is %s", k.ID, k.State, k.JWTState)
}

// state returns the state of the X.509 or of the JWT key.
func (k Keyset) state(f Scope) State {
	if f == JWT && k.JWTState != "" {
		return k.JWTState
	}
	return k.State
}

// safe reports whether the keys of the scope can be removed. A missing key is safe,
// an unknown figure is not.
func (k Keyset) safe(f Scope) bool {
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

func (k Keyset) safeCell(f Scope) string {
	switch {
	case k.state(f) != Tainted:
		return "-" // the server refuses to remove it
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
		return "for " + formatDuration(k.JWTExpiry.Sub(now))
	case k.Unknown != "", k.JWTExpiry.IsZero() && k.state(JWT) == Tainted && !k.JWTSafe:
		return notKnown // without JWT-SVIDs it would be safe
	}
	return "none"
}

// jwtRemark says how long JWT-SVIDs of the keyset are valid. It is empty if none
// are.
func (k Keyset) jwtRemark(now time.Time) string {
	switch {
	case k.JWTExpiry.After(now):
		return fmt.Sprintf("The last JWT-SVID that %s signed expires %s. Removal ends it earlier, at each relying party's next bundle refresh.",
			k.ID, timeAndDistance(k.JWTExpiry, now))
	case k.jwtJustExpired(now) && !k.JWTSafe:
		return fmt.Sprintf("The last JWT-SVID that %s signed expired %s. A relying party with a slow clock may still accept it.", k.ID, timeAndDistance(k.JWTExpiry, now))
	case k.JWTKeyID != "" && (k.Unknown != "" || !k.JWTSafe):
		return fmt.Sprintf("It is not known whether %s signed JWT-SVIDs that are still valid. Removal ends them, at each relying party's next bundle refresh.", k.ID)
	}
	return ""
}

// jwtJustExpired reports whether the last known JWT-SVID of the keyset has expired,
// but may be valid for a slow clock.
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
