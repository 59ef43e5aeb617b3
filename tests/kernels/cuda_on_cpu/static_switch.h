// The packages' own `BOOL_SWITCH`, of which mambascope's ways alone are compiled.
#pragma once
#define EITHER(COND, NAME, ...)                     \
    [&] {                                           \
        if (COND) {                                 \
            static constexpr bool NAME = true;      \
            return __VA_ARGS__();                   \
        } else {                                    \
            static constexpr bool NAME = false;     \
            return __VA_ARGS__();                   \
        }                                           \
    }()
#define ONLY(VALUE, COND, NAME, ...)                                      \
    [&] {                                                                 \
        TORCH_CHECK(bool(COND) == VALUE, #NAME " is not compiled here");  \
        static constexpr bool NAME = VALUE;                               \
        return __VA_ARGS__();                                             \
    }()
#define BOOL_SWITCH(COND, NAME, ...) SWITCH_##NAME(COND, NAME, __VA_ARGS__)
#define SWITCH_kIsEvenLen(...) EITHER(__VA_ARGS__)
#define SWITCH_kIsVecLoad(...) EITHER(__VA_ARGS__)
#define SWITCH_kHasZ(...) EITHER(__VA_ARGS__)
#define SWITCH_kDeltaSoftplus(...) EITHER(__VA_ARGS__)
#define SWITCH_kSiluAct(...) EITHER(__VA_ARGS__)
#define SWITCH_kIsVariableB(...) ONLY(true, __VA_ARGS__)
#define SWITCH_kIsVariableC(...) ONLY(true, __VA_ARGS__)
#define SWITCH_kHasSeqIdx(...) ONLY(false, __VA_ARGS__)
#define SWITCH_kHasDfinalStates(...) ONLY(false, __VA_ARGS__)
#define SWITCH_kDeterministic(...) ONLY(false, __VA_ARGS__)
#define SWITCH_kChunkSizeL64(...) EITHER(__VA_ARGS__)
