package keyset

import "context"

type actorKey struct{}
type noteKey struct{}

// Server is the actor of a mutation that the server makes by itself, such as that of
// a deployment's first keyset.
const Server = "server"

// WithActor sets the actor of the mutations that are called with ctx, for the audit
// log and for automatic rotation, which retires only keysets that it replaced itself.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, actorKey{}, actor)
}

// WithNote sets the note in the audit log of the mutations that are called with ctx.
func WithNote(ctx context.Context, note string) context.Context {
	return context.WithValue(ctx, noteKey{}, note)
}

// Actor returns the actor of the mutations that are called with ctx.
func Actor(ctx context.Context) string {
	if a, ok := ctx.Value(actorKey{}).(string); ok {
		return a
	}
	return Server
}

// Note returns the note for the audit log of the mutations that are called with ctx.
func Note(ctx context.Context) string {
	n, _ := ctx.Value(noteKey{}).(string)
	return n
}
