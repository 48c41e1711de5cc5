package spire

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
)

// find returns the keyset for an ID of a keyset, of one of its keys or of one of their
// authorities.
func (s clusterState) find(id string) (keyset, error) {
	if i := slices.IndexFunc(s.keysets, func(k keyset) bool { return k.matches(id) }); i >= 0 {
		return s.keysets[i], nil
	}
	for _, a := range s.unowned {
		if a.Matches(id) {
			return nil, refusef("%s is in the trust bundle, but not an authority of a given SPIRE server: give the server that has it, or let it expire (%s)", id, a.ExpiresAt)
		}
	}
	return nil, refusal.ErrNotFound
}

func refusef(format string, args ...any) refusal.Error {
	return refusal.Error(fmt.Sprintf(format, args...))
}

// newer returns the keyset that is prepared or takes over, or nil if no rotation is under
// way.
func (s clusterState) newer() keyset {
	if len(s.keysets) < 2 {
		return nil
	}
	return s.keysets[len(s.keysets)-1]
}

// older returns the only keyset, or the one that newer replaces.
func (s clusterState) older() keyset { return s.keysets[0] }

// begin reads the state for a step. All servers must answer, and none may be in a state
// that a step cannot complete.
func (b *Backend) begin(ctx context.Context) (clusterState, error) {
	s, err := b.read(ctx)
	if err != nil {
		return s, fmt.Errorf("nothing was changed: %w", err)
	}
	if len(s.servers) == 1 {
		return s, nil
	}
	for i, v := range s.servers {
		if v.upstream != "" {
			return s, refusef("an upstream authority signs the X.509 authorities of %s: rotate the upstream authority instead, or this server alone", b.servers[i].name)
		}
		if len(v.keys) > 2 {
			return s, refusef("%s has an old authority of one kind and a prepared one of the other: rotate this server alone first, with keysetctl list and its address only", b.servers[i].name)
		}
	}
	return s, nil
}

// each makes a step at each server in turn and stops at the first error. needed says
// where there is something to do. The step is done at all servers before the one that
// fails.
func (b *Backend) each(k keyset, step, done, id string, order []int, needed func(i int) bool, act func(i int) error) error {
	changed := false
	for n, i := range order {
		text := "nothing to do"
		if k[i].exists() {
			text = "already " + done
		}
		if needed(i) {
			if err := act(i); err != nil {
				return b.stepError(step, id, i, changed, err)
			}
			changed, text = true, done
		}
		if len(b.servers) > 1 {
			b.cfg.Notice(fmt.Sprintf("Server %d of %d (%s): %s.", n+1, len(order), b.servers[i].name, text))
		}
	}
	return nil
}

// stepError returns the error of a step at a server. changed says that the step was made
// at another one before.
func (b *Backend) stepError(step, id string, i int, changed bool, err error) error {
	if len(b.servers) == 1 {
		return err
	}
	again := strings.TrimSpace(step + " " + id)
	if errors.Is(err, refusal.ErrBusy) {
		err = errors.New("another command, or SPIRE's automatic rotation, has changed its authorities at the same time")
	}
	if changed {
		return fmt.Errorf("the step is not complete at all servers; run keysetctl %s again: %s: %w", again, b.servers[i].name, err)
	}
	return fmt.Errorf("%s: %w", b.servers[i].name, err)
}

// inOrder returns the indices of the servers.
func (b *Backend) inOrder() []int {
	order := make([]int, len(b.servers))
	for i := range order {
		order[i] = i
	}
	return order
}

// names returns the names of servers.
func (b *Backend) names(servers []int) string {
	var list []string
	for _, i := range servers {
		list = append(list, b.servers[i].name)
	}
	return strings.Join(list, ", ")
}

// where returns the servers where an authority of the keyset fits.
func (k keyset) where(fits func(authority) bool) []int {
	var list []int
	for i, p := range k {
		if p.any(fits) {
			list = append(list, i)
		}
	}
	return list
}

// Prepare implements [runbook.Backend]. At each server in turn it prepares an X.509
// authority, then a JWT authority, where they are missing. It fails if all servers have
// them, or if SPIRE would forget an authority.
//
// Of two calls at the same time, on any client, SPIRE keeps the later authorities. The
// earlier caller gets [refusal.ErrBusy].
func (b *Backend) Prepare(ctx context.Context) (runbook.Keyset, error) {
	s, err := b.begin(ctx)
	if err != nil {
		return runbook.Keyset{}, err
	}
	k := s.newer()
	if k == nil || (len(s.servers) == 1 && s.upstream() && !k.any(inSlot(prepared))) {
		k = make(keyset, len(s.servers)) // with an upstream authority no removal is possible
	}
	lacks := k.lacking(s.servers)
	if err := s.checkPrepare(k, lacks); err != nil {
		return runbook.Keyset{}, err
	}
	b.warnUnowned(s)
	err = b.each(k, "prepare", "prepared", "", b.inOrder(), func(i int) bool { return slices.Contains(lacks, i) }, func(i int) error {
		return b.servers[i].prepare(ctx, b.cfg.TrustDomain, k[i], s.servers[i].noJWT)
	})
	if err != nil {
		return runbook.Keyset{}, err
	}
	after, err := b.read(ctx)
	if err != nil {
		return runbook.Keyset{}, fmt.Errorf("confirm that the keyset is prepared: %w: %w", runbook.ErrOutcomeUnknown, err)
	}
	now := after.newer()
	if now == nil {
		return runbook.Keyset{}, refusal.ErrBusy
	}
	return now.toRunbook(), nil
}

// checkPrepare returns an error if SPIRE would forget an authority, or if all servers have
// the keyset. lacks are those that do not.
func (s clusterState) checkPrepare(k keyset, lacks []int) error {
	one := len(s.servers) == 1
	switch {
	case one && k.any(inSlot(prepared)) && k.any(inSlot(active)):
		return refusef("cannot prepare: only one key of key set %s is activated; activate it again first", k.id())
	case len(lacks) == 0 && k.any(inSlot(prepared)):
		return refusef("cannot prepare: a SPIRE server has room for one prepared key set, which is %s; activate it, then taint and remove the old one", k.id())
	case len(lacks) == 0:
		return refusef("cannot prepare: a SPIRE server has room for one key set beside the active one, and would forget %s; taint and remove it first", s.older().id())
	}
	for _, i := range lacks {
		// A server that has stepped down must not prepare again.
		if s.servers[i].upstream == "" && s.older()[i].any(inSlot(old)) {
			return refusef("cannot prepare: a SPIRE server has room for one key set beside the active one, and would forget %s; taint and remove it first", s.older().id())
		}
	}
	return nil
}

// beginWith begins a step of the keyset that id names.
func (b *Backend) beginWith(ctx context.Context, id string) (clusterState, keyset, error) {
	s, err := b.begin(ctx)
	if err != nil {
		return s, nil, err
	}
	k, err := s.find(id)
	return s, k, err
}

// Activate implements [runbook.Backend]. At each server in turn it activates the X.509
// authority, then the JWT authority. Each server must have the keyset.
func (b *Backend) Activate(ctx context.Context, id string) error {
	s, k, err := b.beginWith(ctx, id)
	if err != nil {
		return err
	}
	several, newer := len(s.servers) > 1, s.newer()
	isNewer := newer != nil && newer.id() == k.id()
	switch lacks := k.lacking(s.servers); {
	case k.any(func(h authority) bool { return h.tainted }):
		return refusal.ErrActivateTainted
	case k.any(inSlot(old)):
		return refusef("cannot activate key set %s: a SPIRE server activates no old one; prepare a new one", k.id())
	case !k.any(inSlot(prepared)) && (len(lacks) == 0 || !several || !isNewer):
		return refusal.ErrActivateActive
	case len(lacks) > 0 && !several:
		return refusef("cannot activate key set %s: only one of its keys is prepared; prepare again first", k.id())
	case len(lacks) > 0:
		return refusef("cannot activate key set %s: not prepared at %s; run keysetctl prepare again first", k.id(), b.names(lacks))
	}
	return b.each(k, "activate", "activated", id, b.inOrder(), func(i int) bool { return k[i].any(inSlot(prepared)) }, func(i int) error {
		return b.servers[i].activate(ctx, id, k[i])
	})
}

// Taint implements [runbook.Backend]. At each server in turn it taints the X.509
// authority, then the JWT authority. No server may sign with the keyset.
func (b *Backend) Taint(ctx context.Context, id string) error {
	s, k, err := b.beginWith(ctx, id)
	if err != nil {
		return err
	}
	signing := k.where(inSlot(active))
	switch {
	case len(signing) > 0 && k.any(inSlot(old)) && len(s.servers) > 1:
		return b.signingRefusal(s, k, "taint", signing)
	case len(signing) > 0:
		return refusal.ErrTaintActive
	case s.upstream():
		return s.upstreamRefusal("tainted", "taint")
	case k.any(inSlot(prepared)):
		return refusef("cannot taint key set %s: a SPIRE server taints only one that was active before; activate it, then another one", k.id())
	case !k.any(untainted):
		return refusal.ErrTaintTainted
	}
	b.warnUnowned(s)
	return b.each(k, "taint", "tainted", id, b.inOrder(), func(i int) bool { return k[i].any(untainted) }, func(i int) error {
		return b.servers[i].taint(ctx, id, k[i])
	})
}

// signingRefusal returns the refusal of a step for a keyset with which some servers still
// sign, while others do not.
func (b *Backend) signingRefusal(s clusterState, k keyset, step string, signing []int) error {
	newer := s.newer()
	remedy := "run keysetctl prepare, then keysetctl activate"
	if newer != nil && len(newer.lacking(s.servers)) == 0 {
		remedy = "run keysetctl activate " + newer.id() + " again"
	}
	return refusef("cannot %s key set %s: %s still signs with it; %s first", step, k.id(), b.names(signing), remedy)
}

// Remove implements [runbook.Backend]. At each server, the last one first, it revokes the
// JWT authority, then the X.509 authority, so that the keyset keeps its ID until the end.
// It must be tainted at all servers.
func (b *Backend) Remove(ctx context.Context, id string, force bool) error {
	s, k, err := b.beginWith(ctx, id)
	if err != nil {
		return err
	}
	signing, notTainted := k.where(inSlot(active)), k.where(untainted)
	switch {
	case len(signing) > 0 && k.any(inSlot(old)) && len(s.servers) > 1:
		return b.signingRefusal(s, k, "remove", signing)
	case len(signing) > 0:
		return refusal.ErrRemoveActive
	case s.upstream():
		return s.upstreamRefusal("revoked", "revoke")
	case len(notTainted) > 0 && len(s.servers) > 1 && k.any(func(h authority) bool { return h.tainted }):
		return refusef("cannot remove key set %s: not tainted at %s; run keysetctl taint %s again first", k.id(), b.names(notTainted), id)
	case len(notTainted) > 0:
		return refusal.ErrRemovePrepared
	}
	if !force {
		if err := b.checkSafe(ctx, s, k); err != nil {
			return err
		}
	}
	b.warnUnowned(s)
	order := b.inOrder()
	slices.Reverse(order)
	return b.each(k, "remove", "removed", id, order, func(i int) bool { return k[i].exists() }, func(i int) error {
		return b.servers[i].revoke(ctx, id, k[i])
	})
}

func (s clusterState) upstreamRefusal(done, verb string) error {
	return refusef("the upstream authority %s signs the X.509 authorities of this SPIRE server, so they cannot be %s; rotate the upstream authority and run spire-server upstreamauthority %s",
		s.servers[0].upstream, done, verb)
}

// warnUnowned warns of untainted authorities that no given server has: a server of the
// cluster may have been forgotten.
func (b *Backend) warnUnowned(s clusterState) {
	warned := false
	for _, a := range s.unowned {
		if !a.Tainted {
			warned = true
			b.cfg.Notice("Warning: " + a.String())
		}
	}
	if warned {
		b.cfg.Notice(runbook.UnownedMeaning)
	}
}
