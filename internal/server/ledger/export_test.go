package ledger

// Sweep is one round of Run.
var Sweep = (*Ledger).sweep
