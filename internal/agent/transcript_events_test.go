package agent_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/status"
)

// event is something that happened.
type event struct {
	at     time.Time
	kind   int
	order  int      // among events of one kind and instant
	what   string   // for SVIDs the outcome or reason, without the state
	who    string   // the authority, or the workload
	how    string   // for SVIDs empty
	states []string // of the SVID, from the first to the last

	section int // 1 for the first; 0: the one of its time
}

// The kinds of events, in the order in which those of one instant are written.
const (
	kindLog     = iota // a message of the agent's log
	kindCall           // a call that asks the server for several SVIDs
	kindSVID           // an SVID changes its state
	kindPush           // a workload reads an answer
	kindEnd            // the last of messages
	kindFigures        // figures of the agent and of the server, when the drill asks for them
)

// messages are those of the agent's log that transcripts show, with their attributes.
// Their order is that of events of one instant. The last one is about the end of a wave,
// and comes after the SVIDs.
var messages = []struct {
	text       string
	attributes []string
}{
	{"agent stopped", nil},
	{"agent started", nil},
	{"state of the last run loaded", []string{"svids", "processes"}},
	{"server recovered, renewals resumed", nil},
	{"server not answering, renewals paused", nil},
	{"x509 authority removed", []string{"authority_id"}},
	{messageTainted, []string{"authority_id", "svids", "delay"}},
	{messageRemovedEarly, []string{"authority_id", "svids"}},
	{"entries synced", []string{"changed", "deleted", "entries"}},
	{messageMissing, []string{"missing", "entries"}},
	{"no entries missing", []string{"returned", "removed"}},
	{"agent SVID renewed", nil},
	{"X.509-SVID signed by a tainted authority again, renewal delayed", []string{"authority_id"}},
	{"no X.509-SVID depends on the tainted authority", []string{"authority_id"}},
}

// Messages that begin sections.
const (
	messageTainted      = "authority tainted, renewals scheduled"
	messageRemovedEarly = "authority removed while X.509-SVIDs depend on it, renewing at once"
	messageMissing      = "entries missing from the server's answer, still served"
)

// transcriptHandler passes all records to a transcript, and those enabled to the next
// handler.
type transcriptHandler struct {
	slog.Handler
	tr *transcript
}

func (*transcriptHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *transcriptHandler) Handle(ctx context.Context, r slog.Record) error {
	h.tr.addRecord(r)
	if !h.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

func (h *transcriptHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &transcriptHandler{h.Handler.WithAttrs(attrs), h.tr}
}

func (h *transcriptHandler) WithGroup(name string) slog.Handler {
	return &transcriptHandler{h.Handler.WithGroup(name), h.tr}
}

func (tr *transcript) addRecord(r slog.Record) {
	attrs := make(map[string]slog.Value)
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value.Resolve()
		return true
	})
	e := event{at: r.Time, kind: kindLog, what: r.Message}
	if r.Message == "X.509-SVID state changed" {
		e.kind, e.what, e.who = kindSVID, attrs["reason"].String(), strings.TrimPrefix(attrs["spiffe_id"].String(), td.IDString())
		e.states = []string{attrs["from"].String(), attrs["to"].String()}
		tr.add(e)
		return
	}
	for i, m := range messages {
		if m.text != r.Message {
			continue
		}
		if e.order = i; i == len(messages)-1 {
			e.kind = kindEnd
		}
		var how []string
		for _, key := range m.attributes {
			switch v := attrs[key]; {
			case key == "authority_id":
				e.who = tr.authority(v.String())
			case v.Kind() == slog.KindDuration:
				how = append(how, fmt.Sprintf("%s=%v", key, v.Duration().Truncate(exact)))
			default:
				how = append(how, fmt.Sprintf("%s=%v", key, v))
			}
		}
		e.how = strings.Join(how, " ")
		tr.add(e)
	}
}

// all returns all events, with those that the workloads and the server saw.
func (tr *transcript) all() []event {
	synctest.Wait()
	tr.mu.Lock()
	events := slices.Clone(tr.events)
	tr.mu.Unlock()
	for _, m := range tr.w.mintsSince(time.Time{}) {
		if n := len(m.entries); n > 1 {
			events = append(events, event{at: m.at, kind: kindCall, what: "SVIDs asked of the server", how: fmt.Sprintf("%d in one call", n)})
		}
	}
	for _, s := range tr.streams {
		events = append(events, tr.answers(s)...)
	}
	slices.SortStableFunc(events, func(a, b event) int { return a.at.Compare(b.at) })
	return events
}

// answers returns what a stream's workload has read, by what changed.
func (tr *transcript) answers(s *stream) []event {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []event
	e := event{kind: kindPush, who: "/workload/" + strings.Join(s.values, "+")}
	for i, u := range s.updates {
		e.at, e.what = u.at, "pushed to the stream"
		if i == 0 {
			e.what, e.how = "stream answered", tr.signers(u)
			out = append(out, e)
			continue
		}
		was := s.updates[i-1]
		switch from, to := tr.signers(was), tr.signers(u); {
		case from != to:
			e.how = from + " -> " + to
		case !slices.Equal(was.names, u.names):
			e.how = fmt.Sprintf("DNS names %q -> %q", was.names, u.names)
		case u.expiry.After(was.expiry):
			e.how = to + ", expires later"
		case u.expiry.Before(was.expiry):
			e.how = to + ", expires sooner"
		case u.serial != was.serial:
			e.how = to + ", same expiry"
		default:
			e.how = "same SVID, another bundle"
		}
		out = append(out, e)
	}
	if s.end != nil && !s.left {
		e.at, e.what, e.how = s.ended, "stream ended", status.Code(s.end).String()
		out = append(out, e)
	}
	return out
}

func (tr *transcript) signers(u update) string {
	names := make([]string, len(u.authorities))
	for i, id := range u.authorities {
		names[i] = tr.authority(id)
	}
	return strings.Join(names, "+")
}
