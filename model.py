        past: [(k, v)] of chunks before x, which it attends to as well; their k are turned here, by their place: rope
            raise ValueError("a past is kept of dense attention within a chunk, on one rank: with it, metadata is "
