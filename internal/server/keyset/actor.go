package keyset

import "context"

type actorKey struct{}
type noteKey struct{}

// Server is the actor of a mutation that nobody asked for, such as the first
// keyset of a deployment.
const Server = "server"

// WithActor says who asks for the mutations that are called with ctx: for the
// audit log, and for automatic rotation, which retires only what it replaced
// itself.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, actorKey{}, actor)
}

// WithNote adds a remark to what the audit log says of the mutations that are
// called with ctx.
func WithNote(ctx context.Context, note string) context.Context {
	return context.WithValue(ctx, noteKey{}, note)
}

// Actor returns who asks for the mutations that are called with ctx.
func Actor(ctx context.Context) string {
	if a, ok := ctx.Value(actorKey{}).(string); ok {
		return a
	}
	return Server
}

func note(ctx context.Context) string {
	n, _ := ctx.Value(noteKey{}).(string)
	return n
}
